"""Studies as they are written down: cells, settings, seeds, records and tables."""

import csv
import itertools
import json
import multiprocessing
import re
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from study_cases import own_study, put, row

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.study import Study, chosen_cells, load_study
from exnorm.config.study_file import SCALES, has_scale
from exnorm.report.claims_table import as_csv, judged_studies
from exnorm.report.html_report import study_page
from exnorm.report.in_short import in_short
from exnorm.report.palette import colour
from exnorm.report.published import claims, published
from exnorm.report.results import BEGIN, END, differences, everything, write_results
from exnorm.report.study_figures import file_of, look
from exnorm.report.study_table import FORMATS, table_of
from exnorm.report.verdicts import judge, known_metrics
from exnorm.runs.records import change_records, read_records
from exnorm.studies import submit
from exnorm.studies.collect import collect
from exnorm.studies.plan import CLASSES, jobs_of, trainings_of
from exnorm.studies.reproduce import print_plan, reproduce

STUDIES = group_options("study")
AT_SCALES = [(name, scale) for name in STUDIES for scale in SCALES if has_scale(name, scale)]


@pytest.mark.parametrize(("name", "scale"), AT_SCALES)
def test_every_study_is_whole(name: str, scale: str) -> None:
    """Its rules are met by a cell, what it names exists, and each paper's number stands at one cell at most."""
    study = load_study(name, scale)
    values = study.values
    assert study.title and not study.title.startswith("exnorm")
    for key in ("columns", "compare"):
        assert values.get(key) in (None, *study.axes)
    assert set(study.metrics) <= set(known_metrics(study))
    assert {wanted["id"] for wanted in values["claims"]} <= set(claims())
    judge(study, [])
    for pair in values.get("ratio_differences", ()):
        assert {study.cell(pair["left"]), study.cell(pair["right"])} <= set(study.by_class)
    for rule in values.get("scales", {}).get(scale, {}).get("when", ()):
        assert set(rule["set"]) <= used_by(study), rule
    everywhere = set().union(*(used_by(load_study(name, at)) for of, at in AT_SCALES if of == name))
    for rule in values.get("when", ()):
        assert set(rule["set"]) <= everywhere, rule


def used_by(study: Study) -> set[str]:
    """The settings of all cells."""
    return {text for cell in study.cells for text in (*cell.train, *(f"eval:{text}" for text in cell.evaluate))}


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_every_study_composes(name: str, tmp_path: Path) -> None:
    """At scale mini each is a run with an identity of its own, unless it evaluates another cell's run.

    Of the study on CamVid, which has real images, only the sources have one without the data.
    """
    study = load_study(name, "mini")
    jobs = jobs_of(study, study.cells, tmp_path)
    lacking = {job.problem.partition(". ")[0] for job in jobs if not job.config_hash}
    assert lacking == ({"data=camvid needs a folder"} if name == "camvid" else set())
    if lacking:
        return
    hashes = [job.config_hash for job in jobs if job.cell and job.seed == 0 and not job.cell.evaluate]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("name", "count"), [("sn-table2", 132), ("sn-hard", 21), ("sn-inference", 30), ("en-transfer", 18), ("en-pi", 17)]
)
def test_a_plan_counts_each_run_once(name: str, count: int, tmp_path: Path) -> None:
    """Four normalizers at nine settings, 3 seeds, and 5 at three of them; evaluations are no runs; sources are."""
    study = load_study(name, "full")
    assert len(trainings_of(jobs_of(study, study.cells, tmp_path))) == count


def test_a_plan_for_imagenet_needs_no_imagenet(cli_here: CliRunner) -> None:
    few = ("reproduce", "sn-table2", "--scale", "full", "--only", "batch=8x2")
    done = cli_here(*few, "--plan", "--seeds", "1", "--images-per-s", "100")
    assert done.returncode == 0, done.stderr
    hours = 4 * 1_281_167 * 100 / 100 / 3600
    assert f"4 runs; 0 runs done, 4 left: {hours:.1f} GPU-hours" in done.stdout
    assert "missing data: data=imagenet needs a folder" in done.stdout
    refused = cli_here(*few)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_a_study_decides_over_its_scale(tmp_path: Path) -> None:
    """At scale mini, SN at 8x32 has a rule for the snapshots; a study that says which has those."""
    axes = "axes: {norm: [sn, bn], more: {no: [], yes: ['trainer.snapshots=[0.1]']}}\nset: [data=digits, batch=8x32"
    for own, expected in (
        ("", ["[0.3,0.6,0.9]", "[0.1]", "[0.1]"]),
        (", 'trainer.snapshots=[0.5]'", ["[0.5]", "[0.1]", "[0.5]", "[0.1]"]),
    ):
        study = load_study(own_study(tmp_path, f"{axes}{own}]"), "mini")
        given = [text.partition("=")[2] for cell in study.cells for text in cell.train if "snapshots" in text]
        assert given == expected


def test_the_file_of_a_study_is_that_study() -> None:
    assert load_study(str(ROOT / "conf" / "study" / "en-pi.yaml"), "mini").cells == load_study("en-pi", "mini").cells


def test_the_last_setting_counts_and_rules_come_last(tmp_path: Path) -> None:
    text = """
axes: {norm: [bn, sn], size: {small: [batch=1x8], large: [batch=1x64, trainer.epochs=9]}}
set: [data=digits, trainer.epochs=5]
when: [{if: {norm: sn, size: large}, set: [trainer.epochs=7, "eval:inference=batch_average"]}]
"""
    study = load_study(own_study(tmp_path, text), "mini")
    epochs = {cell.name: [text for text in cell.train if "epochs" in text] for cell in study.cells}
    assert epochs == {
        "norm=bn size=small": ["trainer.epochs=5"],
        "norm=bn size=large": ["trainer.epochs=9"],
        "norm=sn size=small": ["trainer.epochs=5"],
        "norm=sn size=large": ["trainer.epochs=7"],
    }
    assert [cell.evaluate for cell in study.cells] == [(), (), (), ("inference=batch_average",)]
    assert study.cells[0].train[:2] == ("model=resnet_mini", "data=digits")
    assert len(chosen_cells(study, ["norm=sn,bn", "size=small"])) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sn-tabel2"], "did you mean 'sn-table2'?"),
        (["sn-table2", "--scale", "mimi"], "unknown scale 'mimi': did you mean 'mini'?"),
        (["sn-table2", "--only", "batch=8x3"], "no batch '8x3' in sn-table2: did you mean '8x32'?"),
        (["sn-table2", "--only", "nrom=sn"], "sn-table2 has no axis 'nrom': did you mean 'norm'?"),
        (["sn-table2", "--only", "sn"], "write AXIS=VALUE"),
        (["nowhere.yaml"], "there is no study nowhere.yaml"),
    ],
)
def test_a_wrong_word_is_one_line(arguments: list[str], said: str, cli_here: CliRunner) -> None:
    done = cli_here("reproduce", *arguments, "--plan")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_studies_are_listed_with_what_they_are_about(cli_here: CliRunner) -> None:
    lines = cli_here("list", "studies").stdout.splitlines()
    assert [line.split()[0] for line in lines] == STUDIES
    assert "several batch settings" in next(line for line in lines if line.startswith("sn-table2 "))


def test_a_study_is_no_part_of_a_run(run_cli: CliRunner) -> None:
    done = run_cli("train", "study=sn-table2")
    assert done.returncode == 2 and "Type exnorm reproduce" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axis: {}", "unknown key 'axis': did you mean 'axes'?"),
        ("set: [norm=bn]", "has no axes"),
        ("axes: {norm: [bn]}\nwhen: [{iff: {norm: bn}, set: []}]", "unknown key 'iff': did you mean 'if'?"),
        ("axes: [unclosed", "is not valid yaml: "),
        ("3", "is not valid yaml: "),
        ("[a]", "has no keys with values"),
        ("axes: {norm: []}", "is not axes with values"),
        ("axes: {seed: [1]}", "none called seed"),
        ("axes: {norm: {bn: null}}", "is not axes with values"),
        ("axes: {norm: [bn]}\nset: data=digits", "'data=digits' is not a list of settings such as [batch=8x32]"),
        ("axes: {norm: [bn]}\nseeds: 0", "seeds: 0 is not a number above 0"),
        ("axes: {norm: [bn]}\nscales: {huge: {}}", "unknown scale 'huge'"),
        ("axes: {norm: [bn]}\nscales: {mini: null}", "scales.mini has no keys"),
        ("axes: {norm: [bn]}\nlayers_of: bn", "is not a list of mappings such as [{norm: sn}]"),
        ("axes: {norm: [bn]}\nclaims: [{id: en-pi}]", "'left' is missing"),
        ("axes: {norm: [bn]}\nclaims: [{id: en-pi, left: [[.nan, {norm: bn}]], right: 3}]", "is not a cell such as"),
        ("axes: {norm: [bn]}\nratio_differences: [{left: {norm: bn}}]", "'right' is missing"),
    ],
)
def test_a_wrong_study_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mine.yaml") as caught:
        load_study(own_study(tmp_path, text), "mini")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("columns: nrom", "columns: there is no axis 'nrom': did you mean 'norm'?"),
        ("layers_of: [{nrom: sn}]", "no cell has nrom=sn; axes: norm, epoch"),
        ("more_seeds: [{if: {nrom: sn}, seeds: 5}]", "more_seeds: no axis or setting 'nrom': did you mean 'norm'?"),
        ("more_seeds: [{if: {norm: em}, seeds: 5}]", "more_seeds: no norm 'em': allowed: bn, en"),
        ("when: [{if: {epoch: [30, 61]}, set: []}]", "when: no epoch '61'"),
        ("scales: {mini: {when: [{if: {nrom: sn}, set: []}]}}", "scales.mini.when: no axis or setting 'nrom'"),
        ("scales: {mini: {leave_out: [{norm: em}]}}", "scales.mini.leave_out: no norm 'em': allowed: bn, en"),
        ("scales: {mini: {leave_out: [{eval:inference: x}]}}", "scales.mini.leave_out: no axis 'eval:inference'"),
        ("claims: [{id: en-pi, left: {norm: gn}}]", "no cell has norm=gn"),
        ("classes_of: [{norm: en, epoch: 60}]", "it takes data= alone"),
        ("published: {method: '{nrom}'}", "published: no axis 'nrom': did you mean 'norm'?"),
        ("ratio_differences: [{left: {norm: en}, right: {norm: bn}}]", "2 cells have norm=en; name one"),
        ("ratio_differences: [{left: {epoch: 30, norm: en}, right: {epoch: 30, norm: bn}}]", "not among classes_of"),
    ],
)
def test_a_study_that_names_what_it_does_not_have_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    axes = 'axes: {norm: [bn, en], epoch: {"30": [], "60": ["eval:inference=batch_average"]}}\n'
    with pytest.raises(UserError, match="study mine") as caught:
        load_study(own_study(tmp_path, axes + text), "mini")
    assert said in str(caught.value)
    number = load_study(own_study(tmp_path, f"{axes}layers_of: [{{epoch: 30}}]"), "mini")
    assert [cell.name for cell in number.followed] == ["norm=bn epoch=30", "norm=en epoch=30"]


def test_a_rule_is_met_by_a_setting_that_is_true(tmp_path: Path) -> None:
    """As settings write it, in lower case; without quotes yaml's true is no text."""
    text = "axes: {norm: [bn, sn]}\nset: [trainer.deterministic=true]\n"
    rule = "when: [{if: {trainer.deterministic: true, norm: sn}, set: [norm.hard=true]}]"
    cells = load_study(own_study(tmp_path, text + rule), "mini").cells
    assert ["norm.hard=true" in cell.train for cell in cells] == [False, True]


@pytest.mark.parametrize(
    "claim", ["{id: en-pi, left: {norm: en}}", "{id: en-pi, left: 1, right: 2}", "{id: en-stable, left: 3}"]
)
def test_a_claim_without_cells_to_compare_is_one_line(claim: str, tmp_path: Path) -> None:
    study = load_study(own_study(tmp_path, f"axes: {{norm: [bn, en]}}\nclaims: [{claim}]"), "mini")
    with pytest.raises(UserError, match="study mine: claim en-.* needs .*cell"):
        judge(study, [])


def test_a_claim_of_ones_own_is_judged_and_told(tmp_path: Path, cli_here: CliRunner) -> None:
    said = "{id: mine-small, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: bn}}"
    file = own_study(tmp_path, f"axes: {{norm: [bn, sn]}}\nclaims: [{said}]")
    scores = {"bn": [70.0, 70.1, 70.3], "sn": [80.0, 80.3, 80.2]}
    rows = [row(f"norm={norm}", seed, value) for norm, of in scores.items() for seed, value in enumerate(of)]
    put(tmp_path, "mine", rows)
    done = cli_here("claims", file, "--results", str(tmp_path))
    assert "mine-small (mine): SN is better" in done.stdout and "supported (weak)" in done.stdout, done.stderr
    assert "SN is better" in study_page(load_study(file, "mini"), tmp_path, tmp_path)


def test_the_readme_shows_real_images_once_no_cell_is_empty(tmp_path: Path) -> None:
    """A study that has just begun at scale small does not replace a complete figure, nor does it fill the page."""
    (tmp_path / "README.md").write_text(f"# A\n{BEGIN}\n{END}\nB\n", encoding="utf-8")
    mini, small = load_study("sn-table2", "mini"), load_study("en-imagenet", "small")
    results = tmp_path / "results"

    def shown() -> str:
        texts, _ = everything(results)
        assert texts[tmp_path / "README.md"].startswith(f"# A\n{BEGIN}")
        return texts[tmp_path / "README.md"]

    begun = row("norm=bn batch=8x32", 0, 80.0, scale="small", run="a")
    put(results, "sn-table2", [*(row(cell.name, 0, 70.0, run=cell.name) for cell in mini.cells), begun])
    assert "sn-table2-mini" in shown() and "36 of 36 cells were measured, in 36 runs" in shown()
    rows = [row(cell.name, 0, 80.0, scale="small", run=cell.name) for cell in small.cells]
    put(results, "en-imagenet", rows[:-1])
    assert "sn-table2-mini" in shown()
    put(results, "en-imagenet", rows)
    assert "en-imagenet-small" in shown() and "on CIFAR-10" in shown()
    texts, _ = everything(results)
    page = texts[results / "README.md"]
    assert "1 of 16 cells were measured, in 1 run. " in page
    judged = [line for line in page.splitlines() if "| sn-table2 | small |" in line]
    assert judged == []  # each claim compares a cell that is empty


def test_every_link_of_the_page_is_a_file() -> None:
    """Also that of a figure of a cell such as rate=0.2, whose name has a dot."""
    results = ROOT / "results"
    texts, figures = everything(results)
    files = {*texts, *(file_of(path, ".png") for path in figures)}
    links = re.findall(r"\]\(([\w./-]+)\)", texts[results / "README.md"])
    assert any("-0.0.png" in link for link in links)
    missing = {link for link in links if results / link not in files and not (results / link).exists()}
    assert not missing


def test_the_first_screen_has_the_effects_of_decided_claims_alone(tmp_path: Path) -> None:
    """Real images come first, and they alone have effects; many comparisons have their lowest and highest one."""
    claims = (
        "{id: up, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: bn}}",
        "{id: down, claim: BN is better, expect: left > right, left: {norm: bn}, right: {norm: sn}}",
        "{id: open, claim: GN is better, expect: left > right, left: {norm: gn}, right: {norm: bn}}",
        *(f"{{id: many, claim: A, expect: left > right, left: {{norm: sn}}, right: {right}}}" for right in (5, 50, 20)),
    )
    text = f"axes: {{norm: [bn, sn, gn]}}\nscales: {{small: {{seeds: 5}}}}\nclaims: [{', '.join(claims)}]"
    file = own_study(tmp_path, text)
    for scale in ("mini", "small"):
        noise = {
            "bn": (0.0, 0.1, 0.3, 0.2, 0.1),
            "sn": (10.1, 10.2, 10.0, 10.3, 10.2),
            "gn": (0.0, 9.0, -7.0, 3.0, 1.0),
        }
        rows = [row(f"norm={norm}", seed, 70 + value) for norm, of in noise.items() for seed, value in enumerate(of)]
        put(tmp_path, "mine", [*read_records(tmp_path, "mine"), *(line | {"scale": scale} for line in rows)])
    page = in_short([item for scale in ("mini", "small") for item in judged_studies([file], scale, tmp_path)])
    small, mini = page.partition("**Scale mini")[::2]
    assert small.count("3 of 4 claims are decided") == mini.count("3 of 4 claims are decided") == 1
    holds, fails = small.partition("These do not hold")[::2]
    assert "- SN is better. `mine`: top1 norm=sn > norm=bn: +10.02 [" in holds and "n = 5." in holds
    assert (
        "of 3 comparisons, 3 supported; top1 norm=sn > 50: +30.16 [" in holds
        and " to top1 norm=sn > 5: +75.16" in holds
    )
    assert "- BN is better. `mine`: top1 norm=bn > norm=sn: -10.02 [" in fails and "`open` (mine)" in fails
    assert "GN is better" not in page
    assert "SN is better" not in mini and "These claims hold: `up` (mine), `many` (mine).\n" in mini
    assert "The effects at scale mini are in the tables below." in mini
    put(tmp_path, "mine", [line for line in read_records(tmp_path, "mine") if line["seed"] != "2"])
    page = in_short(judged_studies([file], "small", tmp_path))
    assert "none of 4 claims is decided" in page and "SN is better" not in page
    assert "some of the planned seeds are missing: `up` (mine), `down` (mine), `open` (mine), `many` (mine)." in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metrics: [top1, top2]", "unknown metric 'top2': did you mean 'top5'"),
        ("claims: [{id: x, left: {norm: bn}, right: 3}]", "claim 'x' is none of the papers' (sn-small-batch"),
        ("claims: [{id: x, claim: c, expect: left > 3, left: {norm: bn}}]", "is not left > right, left >= right"),
        ("claims: [{id: en-pi, claim: c, expect: always, left: {norm: bn}}]", "is a paper's; give your own another id"),
        ("claims: [{id: en-pi, metric: top, left: {norm: bn}, right: 3}]", "unknown metric 'top'"),
        ("claims: [{id: en-pi, metric: ratio/bn, left: {norm: sn}, right: 3}]", "and ratio/bn is not in %"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_runs(
    text: str, said: str, tmp_path: Path, cli_here: CliRunner
) -> None:
    file = own_study(tmp_path, f"axes: {{norm: [bn, sn]}}\nset: [data=digits]\n{text}")
    done = cli_here("reproduce", file, "--plan")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_plan_says_what_the_record_has_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record that was made on another machine is no run folder here."""
    study = load_study("en-pi", "mini", seeds=1)
    jobs = jobs_of(study, study.cells, tmp_path / "runs")
    put(tmp_path, "en-pi", [row(jobs[0].name, 0, 80.0) | {"config_hash": str(jobs[0].config_hash)}])
    print_plan(study, jobs, tmp_path, images_per_s=None)
    assert "; 1 more are in the record, but their run folders are not here" in capsys.readouterr().out


def test_a_speed_has_a_deviation_and_the_size_of_a_model_has_none(tmp_path: Path) -> None:
    cell = "model=resnet50 norm=en"
    values = {"top1": (80.0, 81.0), "parameters_m": (0.341, 0.341), "images_per_s": (1000.0, 1200.0)}
    rows = [row(cell, seed, value) | {"metric": name} for name, of in values.items() for seed, value in enumerate(of)]
    put(tmp_path, "en-imagenet", rows)
    text = FORMATS["md"](table_of(load_study("en-imagenet", "mini"), tmp_path))
    assert "| 0.341 (2) |" in text and "| 1100 ± 141 (2) |" in text


def test_a_plan_counts_evaluations_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their runs may all be done."""
    study = load_study("en-transfer", "mini", seeds=1)
    print_plan(study, jobs_of(study, study.cells, tmp_path), tmp_path, images_per_s=None)
    said = "6 runs and 6 evaluations of them; 0 runs done, 6 and 6 evaluations left: "
    assert said in capsys.readouterr().out


def test_notes_of_a_study_and_of_its_scale_are_footnotes(tmp_path: Path) -> None:
    text = (
        "axes: {norm: [bn]}\nnotes: [of all scales]\nscales: {mini: {notes: [of this one]}, full: {notes: [of that]}}"
    )
    study = load_study(own_study(tmp_path, text), "mini")
    put(tmp_path, "mine", [row("norm=bn", 0, 80.0)])
    lines = table_of(study, tmp_path).footnotes()
    assert {"of all scales", "of this one"} < set(lines) and "of that" not in lines
    assert any(line.startswith("Each run has 13 epochs") for line in lines)


def test_what_is_known_of_a_published_number_is_a_footnote(tmp_path: Path) -> None:
    put(tmp_path, "sn-table2", [row("norm=sn batch=8x1", 0, 80.0)])
    study = load_study("sn-table2", "mini")
    (noted,) = [cell for cell in study.cells if (paper := published(study, cell, "top1")) and paper.note]
    said = published(study, noted, "top1")
    assert f"Published {said.text} at {noted.name}: {said.note}." in table_of(study, tmp_path).footnotes()


def test_what_to_type_for_a_study_of_ones_own_names_its_file(tmp_path: Path) -> None:
    file = own_study(tmp_path, "axes: {norm: [bn]}")
    study = load_study(file, "mini")
    with pytest.raises(UserError) as caught:
        table_of(study, tmp_path)
    assert str(caught.value).endswith(f"exnorm reproduce {file} --scale mini")
    put(tmp_path, "mine", [row("norm=bn", 0, 80.0)])
    command = f"exnorm reproduce {file} --scale mini"
    assert f"`{command}`" in FORMATS["md"](table_of(study, tmp_path))
    assert f"{command} --only norm=bn" in study_page(study, tmp_path, tmp_path)


def test_a_run_from_a_checkpoint_is_known_by_the_run_that_it_begins_with(tmp_path: Path) -> None:
    """Another source is another run, before either of them has run."""
    text = """
axes: {at: {half: ["model.init_from={soft@0.5}"]}}
set: [norm=sn, data=digits]
sources: {soft: [norm=%s, "trainer.snapshots=[0.5]"]}
"""
    first, second = (
        jobs_of(study, study.cells, tmp_path)
        for study in (load_study(own_study(tmp_path, text % norm), "mini") for norm in ("sn", "bn"))
    )
    assert [job.cell is None for job in first] == [True] * 3 + [False] * 3
    assert first[3].needs is first[0] and first[3].folder() is None
    assert first[3].config_hash == first[4].config_hash != second[3].config_hash


def test_a_source_is_the_run_that_another_table_has(tmp_path: Path) -> None:
    """The soft ratios that sn-hard begins with are those of SN at 8x32, trained once for both."""
    hard, table = (load_study(name, "mini") for name in ("sn-hard", "sn-table2"))
    source = next(job for job in jobs_of(hard, hard.cells, tmp_path) if job.cell is None)
    (cell,) = table.cells_with({"norm": "sn", "batch": "8x32"})
    assert source.config_hash == jobs_of(table, [cell], tmp_path)[0].config_hash


def test_a_cell_can_begin_with_the_cell_of_another_study(tmp_path: Path) -> None:
    """Chosen by the cell's own values. The run is that study's, so that it is trained once for both."""
    text = """
axes: {norm: [bn, sn], pretrained: {8x32: [], 8x2: []}}
set: [batch=8x2, "model.init_from={before}"]
sources: {before: {study: sn-table2, cell: {norm: "{norm}", batch: "{%s}"}}}
seeds: 1
"""
    study, table = load_study(own_study(tmp_path, text % "pretrained"), "mini"), load_study("sn-table2", "mini")
    jobs = jobs_of(study, study.cells, tmp_path)
    assert len(jobs) == 8 and [job.cell is None for job in jobs] == [True] * 4 + [False] * 4
    for job in jobs[4:]:
        assert job.cell is not None and job.needs is not None
        values = dict(job.cell.key)
        (cell,) = table.cells_with({"norm": values["norm"], "batch": values["pretrained"]})
        assert job.needs.config_hash == jobs_of(table, [cell], tmp_path)[0].config_hash
    assert len({job.config_hash for job in jobs}) == 8
    with pytest.raises(UserError, match="there is no axis 'size'; axes: norm, pretrained"):
        load_study(own_study(tmp_path, text % "size"), "mini")
    with pytest.raises(UserError, match="study sn-table2: 0 cells|no cell has"):
        load_study(own_study(tmp_path, text.replace("{%s}", "9x9")), "mini")


def test_a_choice_of_seeds_leaves_cells_what_they_are(tmp_path: Path) -> None:
    """A job of a cluster asks for one seed; layers and classes of the first one are recorded all the same."""
    study = load_study("en-transfer", "mini", seeds=5)
    first, last = (jobs_of(study, chosen_cells(study, [f"seed={seed}"]), tmp_path) for seed in (0, 4))
    assert sum(CLASSES in job.looks for job in first) == len(study.by_class) == 4 and not any(job.looks for job in last)
    table = load_study("sn-table2", "mini")
    assert set(table.followed) < set(chosen_cells(table, ["seed=0"]))
    for job in (*first, *last):
        assert job.cell is not None
        words = submit._command(study, job, tmp_path, tmp_path)
        only = [words[place + 1] for place, word in enumerate(words) if word == "--only"]
        asked = load_study("en-transfer", "mini", seeds=int(words[words.index("--seeds") + 1]))
        (cell,) = chosen_cells(asked, only)
        assert cell == job.cell and cell.seeds == (job.seed,)


def test_hours_of_a_run_that_cells_share_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study("sn-inference", "mini", seeds=1)
    print_plan(study, jobs_of(study, study.cells, tmp_path), tmp_path, images_per_s=100.0)
    lines = capsys.readouterr().out.splitlines()
    each = [float(line.split()[-1]) for line in lines[1:25]]
    total = float(next(line for line in lines if "left:" in line).split("left: ")[1].split()[0])
    assert sum(each) == pytest.approx(total, abs=0.3) and 0.0 in each


def test_a_record_is_the_sum_of_what_several_processes_add(tmp_path: Path) -> None:
    """Nobody overwrites what another one has written meanwhile."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_rows, args=(tmp_path, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_records(tmp_path, "s")) == 40


def add_rows(results: Path, number: int) -> None:
    """Twenty changes, of one row each."""
    for index in range(20):
        change_records(
            results, "s", lambda before, i=index: {**before, "runs": [*before["runs"], row(f"c{number}", i, 1.0)]}
        )


def test_what_is_not_the_studys_any_more_is_left_out_and_said(tmp_path: Path) -> None:
    """A row with another hash, or of a cell that is gone, goes; the row of another machine's run stays."""
    study = load_study("sn-table2", "mini")
    jobs = jobs_of(study, chosen_cells(study, ["batch=8x2"]), tmp_path / "runs")
    now = {job.name: job.config_hash or "" for job in jobs}
    rows = [
        row("norm=bn batch=8x2", 0, 50.0, config_hash=now["norm=bn batch=8x2"]),
        row("norm=sn batch=8x2", 0, 80.0, config_hash="0ld0ld00"),
        row("norm=sn batch=9x9", 0, 80.0),
        row("norm=sn batch=8x2", 0, 80.0, scale="full", config_hash="other"),
    ]
    put(tmp_path, "sn-table2", rows)
    notes, _ = collect(study, jobs, tmp_path)
    assert len(notes) == 2 and "0ld0ld00" in notes[0] and "no longer has this cell" in notes[1]
    assert [r["cell"] + r["scale"] for r in read_records(tmp_path, "sn-table2")] == [
        "norm=sn batch=8x2full",
        "norm=bn batch=8x2mini",
    ]


def test_a_finished_run_with_another_configuration_is_said_for_the_seeds_that_are_asked_for(tmp_path: Path) -> None:
    """Asking for one seed does not make the runs of the others look wrong."""
    study = load_study("sn-table2", "mini", seeds=1)
    jobs = jobs_of(study, chosen_cells(study, ["norm=bn", "batch=8x2"]), tmp_path / "runs")
    for seed in (0, 1):
        folder = tmp_path / "runs" / "glyphs" / f"old-s{seed}"
        folder.mkdir(parents=True)
        made_for = {"id": "sn-table2", "scale": "mini", "cell": "norm=bn batch=8x2", "seed": seed}
        (folder / "provenance.json").write_text(json.dumps({"study": made_for}))
        (folder / "record.json").write_text("{}")
    (note,), _ = collect(study, jobs, tmp_path)
    assert "old-s0" in note and "now asks for another run" in note


@pytest.mark.parametrize("name", ["sn-table2.yaml", "mine.epochs.yaml"])
def test_a_study_of_ones_own_takes_no_others_record(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("axes: {norm: [bn]}\n")
    with pytest.raises(UserError, match="belongs to another study. Give the file another name"):
        load_study(str(tmp_path / name), "mini")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (",80.0,", ",nan,", r"sn-table2.csv, line 3 is damaged: repair it, or move it away and type exnorm reproduce"),
        (",80.0,", ",8o,", "line 3 is damaged"),
        (",80.0,", ",80.0,80.0,", "line 3 is damaged"),
        ("0.01", "", "as it was"),
        ("metric,value", "value,metric", "has other columns"),
    ],
)
def test_a_damaged_record_is_named_with_its_line(before: str, after: str, said: str, tmp_path: Path) -> None:
    """And nothing that reads it goes on; an hour that is not known is no damage."""
    put(tmp_path, "sn-table2", [row("norm=bn batch=8x2", 0, 60.0), row("norm=sn batch=8x2", 0, 80.0)])
    file = tmp_path / "records" / "sn-table2.csv"
    file.write_text(file.read_text().replace(before, after))
    if said == "as it was":
        assert len(read_records(tmp_path, "sn-table2")) == 2
        return
    with pytest.raises(ValueError, match=said):
        read_records(tmp_path, "sn-table2")
    with pytest.raises(ValueError, match=said):
        write_results(tmp_path)


def test_a_folder_without_records_is_left_as_it_is(tmp_path: Path, cli_here: CliRunner) -> None:
    """In the project's own folder nothing is written over its README; nor is a file taken for a folder."""
    page = tmp_path / "README.md"
    page.write_text("mine")
    done = cli_here("results", ".")
    assert done.returncode == 2 and "has no folder records/" in done.stderr and page.read_text() == "mine"
    done = cli_here("table", "sn-table2", "--results", page)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Not a directory" in done.stderr


def test_settings_that_cannot_work_leave_the_record_as_it_is(tmp_path: Path) -> None:
    """A mistake in the study is found before rows of other settings are left out."""
    for setting, said in (
        ("batch=banana", "norm=bn: batch=banana"),
        ('"eval:foo=3"', "norm=bn: .*foo"),
        ('"model.init_from={soft@0.7}"', "'soft' keeps no snapshot 0.7"),
        (
            '"model.init_from={soft}", "model.init_ratios_from={other}"',
            "begin with one source, not with soft and other",
        ),
    ):
        text = f"axes: {{norm: {{bn: [norm=bn, {setting}]}}}}\nset: [data=digits]\nsources: {{soft: [norm=sn]}}\n"
        study = load_study(own_study(tmp_path, text), "mini", seeds=1)
        put(tmp_path, study.id, [row("norm=bn", 0, 80.0)])
        with pytest.raises(UserError, match=said):
            reproduce(study, jobs_of(study, study.cells, tmp_path / "runs"), tmp_path, at_once=1)
        assert len(read_records(tmp_path, study.id)) == 1


def test_a_table_shows_mean_deviation_seeds_the_papers_number_and_the_best(tmp_path: Path) -> None:
    values = {"norm=bn batch=8x2": [60.0, 62.0], "norm=sn batch=8x2": [80.0, 83.0, 86.0]}
    put(tmp_path, "sn-table2", [row(cell, seed, v) for cell, of in values.items() for seed, v in enumerate(of)])
    table = table_of(load_study("sn-table2", "mini"), tmp_path)
    text = FORMATS["md"](table)
    published = {
        (r["method"], r["setting"]): float(r["value"] or "nan")
        for r in csv.DictReader((ROOT / "results/published/sn2019.csv").read_text().splitlines())
        if r["table"] == "table2"
    }
    paper = published["sn", "batch=8x2"]
    assert f"| sn | 8x2 | **83.00 ± 3.00 (3)** | {paper} |\n" in text
    assert "| bn | 8x2 | 61.00 ± 1.41 (2) |" in text
    assert "| bn | 8x1 | – | does not converge |\n" in text
    assert "| en | 8x2 | – | not available |\n" in text
    assert "Scale mini: nothing here was measured on the paper's data" in text
    assert r"\textbf{83.00 $\pm$ 3.00 (3)}" in FORMATS["tex"](table)
    assert "<td class=best>83.00 ± 3.00 (3)</td>" in FORMATS["html"](table)
    lines = list(csv.DictReader(FORMATS["csv"](table).splitlines()))
    (cell,) = (r for r in lines if (r["norm"], r["batch"]) == ("sn", "8x2"))
    assert (float(cell["mean"]), float(cell["std"]), cell["n"], float(cell["published"])) == (83.0, 3.0, "3", paper)


@pytest.mark.parametrize("bn", [[80.0, 81.0, 82.0], [80.0], [79.0, 80.4, 82.5]])
def test_the_best_is_marked_only_beyond_the_noise(bn: list[float], tmp_path: Path) -> None:
    """Equal means, one seed, and an interval that has 0 in it mark nothing."""
    study = load_study(own_study(tmp_path, "axes: {norm: [bn, sn]}\nmetrics: [top1, ratio/bn]\n"), "mini")
    rows = [row("norm=bn", seed, value) for seed, value in enumerate(bn)]
    rows += [row("norm=sn", seed, 80.0 + seed) for seed in range(3)]
    put(tmp_path, study.id, [*rows, row("norm=sn", 0, 0.3, "ratio/bn")])
    text = FORMATS["md"](table_of(study, tmp_path))
    assert "**" not in text and "| sn | 81.00 ± 1.00 (3) | 0.3000 (1) |" in text
    put(
        tmp_path,
        study.id,
        [row("norm=bn", seed, 82.0 + seed + 0.1 * (seed == 1)) for seed in range(3)] + rows[len(bn) :],
    )
    assert "| bn | **83.03 ± 1.00 (3)** |" in FORMATS["md"](table_of(study, tmp_path))
    assert "<h1>A study of mine</h1>" in study_page(study, tmp_path, tmp_path)


def test_a_difference_from_the_papers_number_is_shown_where_the_data_are_the_papers(tmp_path: Path) -> None:
    put(tmp_path, "sn-table2", [row("norm=sn batch=8x2", 0, 70.0, scale=scale) for scale in SCALES])
    tables = {scale: table_of(load_study("sn-table2", scale), tmp_path) for scale in SCALES}
    assert "| difference |" in FORMATS["md"](tables["full"]) and "difference |" not in FORMATS["md"](tables["mini"])
    for scale, table in tables.items():
        lines = csv.DictReader(FORMATS["csv"](table).splitlines())
        (found,) = (line["difference"] for line in lines if line["mean"])
        assert bool(found) == (scale == "full")


def test_lines_of_a_figure_differ_in_colour_or_dash() -> None:
    """A normalizer has its colour wherever normalizers are lines; nothing else has it."""
    for name, figure in itertools.product(STUDIES, ("accuracy", "curves")):
        study = load_study(name, "mini")
        across = study.values.get("columns", next(iter(study.axes)) if figure == "accuracy" else None)
        keys = [dict(cell.key) for cell in study.cells]
        keys = [key for key in keys if across is None or key[across] == study.axes[across][0]]
        looks = [look(study, key, across, number) for number, key in enumerate(keys)]
        assert len(set(looks)) == len(looks), name
        for key, (tint, _) in zip(keys, looks, strict=True):
            assert (tint == colour(key.get("norm", ""))) == (across != "norm" and "norm" in key)


def test_a_table_without_measurements_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exnorm reproduce en-pi --scale mini"):
        table_of(load_study("en-pi", "mini"), tmp_path)


def test_a_study_shows_the_sheets_that_bear_its_name(tmp_path: Path) -> None:
    put(tmp_path, "sn-table2", [row("norm=bn batch=8x2", 0, 60.0)])
    (tmp_path / "sheets").mkdir()
    for name in ("sn-table2-mini-predictions", "sn-table20-mini-predictions", "glyphs"):
        (tmp_path / "sheets" / f"{name}.png").write_bytes(b"")
    write_results(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("](sheets/") == 1 and "](sheets/sn-table2-mini-predictions.png)" in page
    (tmp_path / "sheets" / "sn-table2-mini-predictions.png").unlink()
    assert [line.split("/")[-1] for line in differences(tmp_path)] == ["README.md differs from the records"]


def test_results_are_what_the_records_say_or_are_named(tmp_path: Path) -> None:
    """A number that is changed by hand, a file that is missing and one that nothing stands behind are each found."""
    rows = [row("norm=bn batch=8x2", 0, 60.0), row("norm=sn batch=8x2", 0, 80.0)]
    put(tmp_path, "sn-table2", rows)
    written = write_results(tmp_path)
    assert {path.suffix for path in written} == {".md", ".csv", ".svg", ".png"} and differences(tmp_path) == []
    table = tmp_path / "tables" / "sn-table2-mini.md"
    table.write_text(table.read_text().replace("80.00", "81.00"))
    (tmp_path / "figures" / "sn-table2-mini-accuracy.png").unlink()
    (tmp_path / "tables" / "mine.md").write_text("typed")
    lines = differences(tmp_path)
    assert [line.split(" ")[0].rpartition("/")[2] for line in lines] == [
        "sn-table2-mini.md",
        "sn-table2-mini-accuracy.png",
        "mine.md",
    ]
    assert "undecided" in as_csv(judged_studies([], "mini", tmp_path))
    with pytest.raises(UserError, match="no folder .*nowhere"):
        judged_studies([], "mini", tmp_path / "nowhere")


def test_the_committed_results_are_what_the_records_say() -> None:
    assert differences(ROOT / "results") == []


AT_SMALL = """
axes: {norm: [bn, sn]}
seeds: 2
claims: [{id: mine, claim: SN is better, expect: left > right, left: {norm: sn}, right: {norm: bn}}]
scales:
  small:
    seeds: 4
    more_seeds: [{if: {norm: sn}, seeds: 6}]
    leave_out: []
    claims: []
"""


def test_a_scale_can_have_seeds_and_claims_of_its_own(tmp_path: Path) -> None:
    study = own_study(tmp_path, AT_SMALL)
    small, mini = load_study(study, "small"), load_study(study, "mini")
    assert [len(cell.seeds) for cell in small.cells] == [4, 6] and small.values["claims"] == []
    assert [len(cell.seeds) for cell in mini.cells] == [2, 2] and len(mini.values["claims"]) == 1
    assert "data=cifar10_jpeg" in small.cells[0].train and "data=glyphs" in mini.cells[0].train


def test_scale_small_is_only_for_studies_that_have_it(tmp_path: Path) -> None:
    study = own_study(tmp_path, AT_SMALL.partition("scales:")[0])
    with pytest.raises(UserError, match="study mine has no scale small. Its scales are mini, full"):
        load_study(study, "small")
    at_small = {name for name in group_options("study") if has_scale(name, "small")}
    assert at_small == {"sn-table2", "en-imagenet", "en-noise", "sn-norms"}


def test_a_claim_of_a_scale_is_checked_too(tmp_path: Path) -> None:
    study = own_study(tmp_path, AT_SMALL.replace("claims: []", "claims: [{id: mine, lft: {norm: sn}}]"))
    with pytest.raises(UserError, match="scales.small, claims: unknown key 'lft': did you mean 'left'"):
        load_study(study, "small")


def test_a_cell_that_is_left_out_leaves_its_place_empty(tmp_path: Path) -> None:
    """The others stay under their own heads; a column without cells is not there."""
    text = """
axes: {norm: [bn, sn], batch: [8x32, 8x8, 1x8]}
columns: batch
scales: {mini: {leave_out: [{batch: 8x8}, {norm: bn, batch: 8x32}]}}
"""
    study = load_study(own_study(tmp_path, text), "mini")
    put(tmp_path, "mine", [row("norm=bn batch=1x8", 0, 70.0), row("norm=sn batch=8x32", 0, 80.0)])
    grid = table_of(study, tmp_path).across()
    assert grid.heads == ["norm", "8x32", "1x8"]
    assert [[entry.text for entry in line] for line in grid.rows] == [
        ["bn", "", "70.00 (1)"],
        ["sn", "80.00 (1)", "–"],
    ]


def test_labels_of_a_run_without_wrong_labels_are_refused_before_it_trains(tmp_path: Path) -> None:
    text = "axes: {norm: [en]}\nset: [data=digits]\nlabels_of: [{norm: en}]"
    study = load_study(own_study(tmp_path, text), "mini")
    (first, *_) = jobs_of(study, study.cells, tmp_path)
    with pytest.raises(UserError, match="norm=en: labels_of is for runs with wrong labels; give it data.noise"):
        first.check()

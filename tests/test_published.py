"""The papers' numbers: complete, each with its source, and typed nowhere else."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import CliRunner

from exnorm.config.errors import UserError
from exnorm.config.study import load_study
from exnorm.report.published import published

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "results" / "published"
TABLES = ("sn2019", "en2020", "other")
DECIMAL = re.compile(r"(?<![\d.])\d\d\.\d+(?![\d.])")
COLUMNS = ["paper", "table", "method", "backbone", "dataset", "split", "setting", "metric", "value", "note"]


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a file of published numbers."""
    return list(csv.DictReader((PUBLISHED / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("name", TABLES)
def test_every_number_has_a_source_and_a_setting(name: str) -> None:
    """A cell without a value says why."""
    sources = yaml.safe_load((PUBLISHED / "SOURCES.yaml").read_text(encoding="utf-8"))
    assert (PUBLISHED / f"{name}.csv").read_text(encoding="utf-8").splitlines()[0].split(",") == COLUMNS
    for row in rows(name):
        assert row["paper"] in sources and all(row[key] for key in ("table", "method", "dataset", "metric")), row
        assert row["note"] if not row["value"] else float(row["value"]) == float(row["value"]), row


def test_every_claim_is_of_a_paper_with_a_source() -> None:
    sources = yaml.safe_load((PUBLISHED / "SOURCES.yaml").read_text(encoding="utf-8"))
    claims = rows("claims")
    assert len({row["id"] for row in claims}) == len(claims) > 0
    assert all(row["paper"] in sources and row["claim"] and row["left"] for row in claims)


@pytest.mark.slow
def test_a_reader_who_has_ens_paper_adds_rows_and_the_tables_show_them(tmp_path: Path, run_cli: CliRunner) -> None:
    """As results/README.md asks: rows in the columns of sn2019.csv, then `exnorm results`."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "exnorm", copy / "exnorm", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("conf", "results/published", "results/records"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in (copy / "results" / "records").iterdir():
        if not file.name.startswith("en-ablation"):
            file.unlink()
    with (copy / "results" / "published" / "en2020.csv").open("a", encoding="utf-8") as stream:
        for variant, value in (("en", "61.25"), ("no-conv", "60.75")):
            stream.write(f"en2020,ablation,{variant},resnet50,imagenet,val,batch=8x32,top1,{value},\n")
    done = run_cli("results", copy / "results", env={"PYTHONPATH": str(copy)}, cwd=copy)
    assert done.returncode == 0, done.stderr
    with (copy / "results" / "tables" / "en-ablation-mini.csv").open(encoding="utf-8", newline="") as stream:
        found = {row["variant"]: row["published"] for row in csv.DictReader(stream) if row["metric"] == "top1"}
    assert (found["en"], found["no-conv"], found["relu"]) == ("61.25", "60.75", "")


def lines_of_tables() -> set[tuple[str, ...]]:
    """Each three accuracies or errors that follow each other in a row or a column of a paper's table."""
    series: dict[tuple[str, ...], list[str]] = {}
    for row in (row for name in TABLES for row in rows(name)):
        for along in ("method", "setting", "metric", "backbone"):
            key = tuple(value for column, value in row.items() if column not in ("value", "note", along))
            series.setdefault((along, *key), []).append(row["value"])
    threes = {three for values in series.values() for three in zip(values, values[1:], values[2:], strict=False)}
    return {three for three in threes if all(DECIMAL.fullmatch(value) for value in three)}


def typed(text: str, lines: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The parts of a paper's table that a text repeats."""
    numbers = DECIMAL.findall(re.sub(r"<!-- made by.*?<!-- end -->", "", text, flags=re.DOTALL))
    return set(zip(numbers, numbers[1:], numbers[2:], strict=False)) & lines


def test_no_table_of_a_paper_is_typed_anywhere_else() -> None:
    """Three numbers in its order, in code, configuration, scripts or the README. One number alone proves nothing."""
    lines = lines_of_tables()
    first, second, third = (row["value"] for row in rows("sn2019")[:3])
    assert len(lines) > 50 and typed(f"| bn | {first} | {second} | {third} |", lines)
    assert not typed(f"{first} reached, {third} expected, {first} again", lines)
    files = [*(ROOT / "exnorm").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "scripts").rglob("*.py")]
    for file in [*files, ROOT / "README.md", ROOT / "Makefile"]:
        found = typed(file.read_text(encoding="utf-8"), lines)
        assert not found, f"{file} repeats {found}; read them from results/published/"


def test_a_study_that_asks_for_several_numbers_at_once_is_refused(tmp_path: Path) -> None:
    """Not knowing the batch setting, none of the nine is the one."""
    file = tmp_path / "mine.yaml"
    file.write_text("axes: {norm: [bn]}\npublished: {table: table2, method: '{norm}'}\n")
    study = load_study(str(file), "mini")
    with pytest.raises(UserError, match="study mine: published: 9 numbers fit norm=bn, top1; .* differ in: setting"):
        published(study, study.cells[0], "top1")


def test_each_number_of_a_table_that_a_study_answers_to_stands_at_one_cell() -> None:
    """Of SN's tables II and III: every accuracy is found, each once, with its own value."""
    for study_id, table, metrics in (
        ("sn-table2", "table2", ("top1",)),
        ("sn-depth", "table3a", ("top1", "top5")),
        ("sn-hard", "table3b", ("top1",)),
    ):
        study = load_study(study_id, "full")
        printed = [row for row in rows("sn2019") if row["table"] == table and row["metric"] in metrics]
        found = [published(study, cell, metric) for cell in study.cells for metric in metrics]
        assert sorted(row["value"] for row in printed) == sorted(
            "" if item.value is None else item.text for item in found if item is not None
        )
    norms = {"in": "in", "ln": "ln", "bn": "bn", "gn": "gn", "sn": "sn", "ssn": "ssn", "sn-group2": "sn-group2"}
    study = load_study("sn-norms", "full")
    for name, method in norms.items():
        item = published(study, study.cell({"norm": name}), "top1")
        values = {
            row["value"]
            for row in (*rows("sn2019"), *rows("other"))
            if (row["method"], row["setting"], row["metric"]) == (method, "batch=8x32", "top1")
            and (row["backbone"], row["dataset"]) == ("resnet50", "imagenet")
        }
        assert item is not None and item.text.split()[0] in values, name

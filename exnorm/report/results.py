"""`exnorm results`: write tables, verdicts, figures and `results/README.md` from `results/records/`.

`--check` writes nothing and prints the files that differ from the records. It compares figures by the numbers in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.study import load_study
from exnorm.config.study_file import SCALES
from exnorm.report.claims_table import (
    SO_FAR,
    WEAK,
    Judged,
    as_csv,
    grid_of,
    judged_studies,
    labelled,
    not_covered,
    readings,
)
from exnorm.report.faults import section as section_on_faults
from exnorm.report.grids import Entry, Grid, to_markdown
from exnorm.report.in_short import in_short
from exnorm.report.published import claims_of
from exnorm.report.study_figures import StudyFigure, class_remarks, figures_of, file_of, save
from exnorm.report.study_table import FORMATS, StudyTable, table_of
from exnorm.report.tests_of_difference import LEVEL, POWER
from exnorm.report.verdicts import MARGIN, as_claimed, is_begun
from exnorm.runs.folder import write_text_atomic
from exnorm.runs.layer_ratios import LARGE_KL
from exnorm.runs.records import read_records, recorded

SUFFIXES = ("md", "csv")
SHEETS = "sheets"  # pictures that need the data or run folders; a study shows those that begin with its name and scale
# Of one of these the figure is in the project's README, between the two marks: of the first without an empty cell
FRONTS = (("sn-table2", "full"), ("sn-table2", "small"), ("en-imagenet", "small"), ("sn-table2", "mini"))
BEGIN, END = "<!-- made by exnorm results -->", "<!-- end -->"


def write_results(results: Path) -> list[Path]:
    """Write everything that is made from the records. Return the files."""
    texts, figures = everything(results)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    for path, figure in figures.items():
        save(figure, path)
    return [*texts, *pictures(figures)]


def differences(results: Path) -> list[str]:
    """Return a line for each file that differs from the records."""
    texts, figures = everything(results)
    drawn = pictures(figures)
    lines = [f"{path} differs from the records" for path, text in texts.items() if _read(path) != text]
    lines += [f"{path} is missing" for path in drawn if not path.is_file()]
    known = {*texts, *drawn}
    folders = (results / "tables", results / "figures")
    return lines + [
        f"{path} belongs to no record" for folder in folders for path in sorted(folder.glob("*")) if path not in known
    ]


def pictures(figures: Iterable[Path]) -> list[Path]:
    """Return the pictures of figures, given by their paths without suffix."""
    return [file_of(path, suffix) for path in figures for suffix in (".svg", ".png")]


def everything(results: Path) -> tuple[dict[Path, str], dict[Path, StudyFigure]]:
    """Return the texts to write by their path, and the figures by their path without suffix."""
    if not (results / "records").is_dir():
        raise UserError(f"{results} has no folder records/. Give the folder that contains records/, such as results")
    texts: dict[Path, str] = {}
    figures: dict[Path, StudyFigure] = {}
    tables = measured_tables(results)
    for table in tables:
        name = f"{table.study.id}-{table.study.scale}"
        for suffix in SUFFIXES:
            texts[results / "tables" / f"{name}.{suffix}"] = FORMATS[suffix](table)
        for figure in figures_of(table.study, results):
            path = results / "figures" / f"{name}-{figure.name}"
            figures[path] = figure
            texts[file_of(path, ".csv")] = figure.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    judged = [item for scale in SCALES for item in judged_studies([], scale, results)]
    texts[results / "claims.csv"] = as_csv(judged)
    sheets = sorted(path.stem for path in (results / SHEETS).glob("*.png"))
    said = {(table.study.id, table.study.scale): class_remarks(table.study, results) for table in tables}
    names, faults = [path.name for path in figures], section_on_faults(results)
    texts[results / "README.md"] = page(tables, judged, names, sheets, said, faults=faults)
    front = _read(results.parent / "README.md")
    complete = {(table.study.id, table.study.scale): table for table in tables if not empty_cells(table)}
    shown = next((complete[name] for name in FRONTS if name in complete), None)
    if front is not None and shown is not None and BEGIN in front and END in front.partition(BEGIN)[2]:
        before, rest = front.partition(BEGIN)[::2]
        after = rest.partition(END)[2]
        block = first_screen(shown, results.name)
        texts[results.parent / "README.md"] = f"{before}{BEGIN}{block}{END}{after}"
    return texts, figures


def measured_tables(results: Path) -> list[StudyTable]:
    """Return the tables of all studies and scales that have a record."""
    found = []
    for name in group_options("study"):
        scales = {row["scale"] for row in read_records(results, name)}
        found += [table_of(load_study(name, scale), results) for scale in SCALES if scale in scales]
    return found


def own_records(results: Path) -> list[str]:
    """Return the names of the records whose study is not in `conf/study`."""
    return [name for name in recorded(results) if name not in group_options("study")]


def page(
    tables: Sequence[StudyTable],
    judged: Sequence[Judged],
    figures: Sequence[str],
    sheets: Sequence[str],
    remarks: Mapping[tuple[str, str], Sequence[str]],
    *,
    faults: str | None = None,
) -> str:
    """Return the text of `results/README.md`, which a reader understands without the code.

    Args:
        remarks: lines on the ratios of a study, by its id and scale.
        faults: the section on faults, if there is one.
    """
    by_study = {(item.study.id, item.study.scale): item for item in judged}
    missing = [name for name in group_options("study") if name not in {table.study.id for table in tables}]
    at = {table.study.scale: table.study.scale_notes for table in tables}
    about = [line for scale, notes in at.items() if notes for line in (f"At scale {scale}:", _list(notes))]
    parts = [
        "# What was measured",
        in_short(judged),
        INTRODUCTION,
        *about,
        "## What agrees with the papers, and what does not",
        to_markdown(summary(judged)),
        JUDGED,
    ]
    uncovered = ", ".join(f"`{claim}`" for claim in not_covered())
    unmeasured = f" Not measured yet: {', '.join(missing)}." if missing else ""
    tested = f"No study tests: {uncovered}." if uncovered else "Every claim has a study."
    parts.append(tested + unmeasured)
    for table in tables:
        key = table.study.id, table.study.scale
        parts += section(table, by_study[key], figures, sheets, remarks.get(key, ()))
    return "\n\n".join([*parts, *filter(None, [faults]), ENDING]) + "\n"


def section(
    table: StudyTable, judged: Judged, figures: Sequence[str], sheets: Sequence[str], remarks: Sequence[str]
) -> list[str]:
    """Return the section of one study: its first table, accuracy figures, sheets, remarks, verdicts and links."""
    study = table.study
    name = f"{study.id}-{study.scale}"
    caption, grid = table.grids()[0]
    shows = f" The table shows {caption}." if caption else ""
    parts = [f"## {study.title}", f"`{study.id}`, scale {study.scale}. {duration(table)}{shows}", to_markdown(grid)]
    own = [figure for figure in figures if figure.startswith(f"{name}-")]
    parts += [f"![{study.title}](figures/{figure}.png)" for figure in own if "accuracy" in figure]
    parts += [f"![{study.title}]({SHEETS}/{sheet}.png)" for sheet in sheets if sheet.startswith(f"{name}-")]
    parts.append(_list([*table.remarks(), *remarks]))
    parts += [to_markdown(grid_of(judged)), _list(readings(judged))] if judged.comparisons else []
    others = " · ".join(f"[{figure.removeprefix(f'{name}-')}](figures/{figure}.png)" for figure in own)
    parts.append(f"[All cells and footnotes](tables/{name}.md) · [numbers](tables/{name}.csv) · figures: {others}")
    return [part for part in parts if part]


def first_screen(table: StudyTable, folder: str) -> str:
    """Return what the project's README shows of the results: one figure."""
    study = table.study
    name = f"{study.id}-{study.scale}"
    on = {
        "mini": " on characters that exnorm draws, with a small ResNet",
        "small": " on CIFAR-10, with a small ResNet",
        "gpu": " on CIFAR-10, with a ResNet-18",
    }.get(study.scale, "")
    return (
        f"\n\n![{study.title}](./{folder}/figures/{name}-accuracy.png)\n\n"
        f"{study.title}. The figure shows top-1 accuracy in %{on}. {duration(table)} "
        f"[{folder}/README.md]({folder}/README.md) has all studies, with tables and verdicts.\n"
    )


def empty_cells(table: StudyTable) -> set[str]:
    """Return the cells of which nothing was measured."""
    return {cell.name for cell in table.study.cells} - {row["cell"] for row in table.rows_of(table.study.primary.name)}


def duration(table: StudyTable) -> str:
    """Return a text with the number of cells and runs, the time and the devices."""
    rows, runs, count = table.rows_of(table.study.primary.name), table.hours(), len(table.study.cells)
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    if not runs:
        return f"0 of {count} cells were measured."
    return (
        f"{count - len(empty_cells(table))} of {count} cells were measured, in {len(runs)} "
        f"run{'s' if len(runs) > 1 else ''}. Training took "
        f"{sum(runs.values()):.1f} hours in all, {60 * sum(runs.values()) / len(runs):.1f} minutes per run, without "
        f"validation, on {devices}."
    )


def summary(judged: Sequence[Judged]) -> Grid:
    """Return a row for each claim and study, if something was measured of it."""
    rows = [
        [
            Entry(f"{known[claim].claim} ({known[claim].paper})"),
            Entry(item.study.id),
            Entry(item.study.scale),
            Entry(str(min(comparison.n for comparison in found))),
            Entry(as_claimed(found)),
            Entry(labelled(found), True),
        ]
        for item, known in ((item, claims_of(item.study)) for item in judged)
        for claim, found in item.comparisons.items()
        if is_begun(found)
    ]
    return Grid(("claim", "study", "scale", "n", "as claimed", "verdict"), rows)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


INTRODUCTION = """## How it was measured
`exnorm results` writes this page from `records/`; nothing here is typed by hand. `records/*.csv` hold every number \
with its seed, commit, device, versions, duration and the hash of its configuration. `exnorm reproduce STUDY` \
measures them again, on this or another machine. If it is stopped, the same command continues.

**Scale mini** runs on a laptop. It replaces the papers' data and backbone by smaller ones:

- `glyphs` replaces ImageNet: ten classes of characters drawn in many styles, 12,000 images of 32 px. The validation \
images have fonts that training does not see.
- `glyphs_web` replaces WebVision: characters in other styles, with a fifth of the labels wrong.
- `glyph_scenes` and `glyph_streets` replace ADE20K and Cityscapes: drawn scenes of digits and drawn streets, with \
masks. The streets that validate are of other cities than those that train.
- `resnet_mini`, a ResNet of four blocks, replaces ResNet-50.

The batch settings are the papers' (replicas x samples, as virtual replicas on one core). The other settings were \
chosen with BN alone, and with a seed that is in no record; `conf/scale/mini.yaml` says how. **A mini result is not \
an ImageNet result.** It shows whether an effect appears at all at this size.

**Scale small** has real images: CIFAR-10 as JPEG files replaces ImageNet, and `resnet_small`, a ResNet of four \
blocks, replaces ResNet-50. Its settings were chosen in the same way (`conf/scale/small.yaml`). Human labels are those \
of CIFAR-10N. **Scale gpu** is the same with a ResNet-18 on a GPU.

**Scale full** is the papers' protocol, from the same files in `conf/study/`.

**The tables** show the mean ± standard deviation over seeds, with the number of seeds in brackets. At scale \
mini, three seeds are planned for each cell, and five for the cells of the main claims; at scale small, five and ten. \
Accuracies are in %. Among \
cells that differ in one axis only, bold marks the best one, if the 95 % interval of its difference to the next one \
excludes 0. *Published* is the paper's number, on the paper's data; at scale mini it is the number of another task. Do \
not compare means over different numbers of seeds. The comparisons below a table use only the seeds that both cells \
have."""

JUDGED = f"""A verdict covers the comparisons listed in the study's section. They may test less than the full claim.

- A comparison uses the differences of equal seeds (same data order and initialization). It is judged by a t-test \
with Holm's correction over all comparisons of a paper at a scale.
- A comparison is supported or contradicted if the corrected p is below {LEVEL}. Otherwise two one-sided t-tests \
decide whether there is **no difference larger than {MARGIN} points**, with a correction of their own. What neither \
decides is undecided.
- A claim is supported if all of its comparisons are supported, and contradicted if one is contradicted. It is \
supported in part if some are supported and the others show no difference.
- Some comparisons name their seeds, in brackets. These seeds alone decide them, and were written down before their \
first run. So the seeds that suggested a comparison do not count in it.
- The intervals in the sections are not corrected. So an interval without 0 can belong to an undecided comparison.
- *Detectable* is the smallest difference that a t-test of one comparison, with as many seeds and the measured \
deviation, finds in {POWER:.0%} of all repetitions.
- "No worse than" (>=) allows {MARGIN} points. "Four times a gain" (>= 4 *) allows nothing, and is undecided unless \
the 95 % interval of the gain itself is above 0.
- A comparison that does not do what the paper did is not comparable. A note of its study says why.
- *n* is the number of seeds that both sides of a comparison have.
- A claim that something always holds is judged by all runs of its cells, and *n* is their number. If none of them \
failed, the limit in brackets says how large the share of failing runs can still be (95 % confidence, if runs fail \
independently of each other).
- *As claimed* counts the comparisons whose mean difference lies on the claimed side. This count alone decides nothing.
- *Weak* means {WEAK}.
- *So far* means that {SO_FAR}.
- Accuracies are compared in points. `ratio/bn` and `ratio/ln` are mean shares over all layers, between 0 and 1. \
`ratio_kl/large` is a share of SN's layers in %. It counts the layers whose ratios of the mean and of the variance \
have a symmetric Kullback-Leibler divergence above {LARGE_KL} nats.
- The last epoch counts. No best epoch is picked on the validation set."""

ENDING = """## The papers' numbers
`published/` holds them with their sources. The tables of EN's paper were not available here, so its cells read "not \
available". If you have the paper, add rows to `published/en2020.csv`, in the columns of `sn2019.csv`, and type \
`exnorm results`. The column `table` is the name that `published:` in the study's yaml gives. Speed and memory are in \
`bench/`."""

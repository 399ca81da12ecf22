"""`exnorm report STUDY|RUN_DIR`: write one HTML file, which needs no network, with every run behind the numbers."""

import base64
import glob
import html
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from exnorm.config.errors import UserError, suggest
from exnorm.config.groups import group_options
from exnorm.config.metrics import Metric, metrics_of
from exnorm.config.study import Cell, Study, load_study
from exnorm.config.study_file import is_file_name
from exnorm.report.claims_table import Judged, grid_of, judged_study
from exnorm.report.explorer import explorer, explorer_of_run, sets_of_study
from exnorm.report.grids import Entry, Grid, to_html
from exnorm.report.measured import measured
from exnorm.report.page import page
from exnorm.report.published import claims_of
from exnorm.report.ratio_figures import dynamics, stacked
from exnorm.report.results import duration
from exnorm.report.run_figures import best_epoch, curves
from exnorm.report.study_figures import STYLE, counts_steps, figures_of
from exnorm.report.study_table import StudyTable, answers_to, column_of, table_of
from exnorm.runs.folder import RunFolder, check_out, write_text_atomic
from exnorm.runs.layer_ratios import shares
from exnorm.runs.metrics import MetricsLog, validated
from exnorm.runs.records import PRIMARY, Row, read_records

WIDTH, HEIGHT = 220, 70  # px of a small curve
PIXELS, POINTS = 96, 72  # in an inch
SMALLEST = 8  # px of the smallest readable letter
Curve = list[tuple[float, float]]  # epoch and primary metric
Drawn = tuple[str, Callable[[], Figure]]  # the name of a figure, and the function that draws it
KEPT = ("seed", "value", "hours", "device", "torch", "commit", "config_hash", "run")


def write_report(what: str, scale: str, out: Path | None, *, runs: Path, results: Path) -> Path:
    """Write the page of a run if `what` is a folder, or else of a study. Return the file."""
    if out is not None:
        check_out(out, ".html", ".htm")
    if Path(what).is_dir():
        folder = RunFolder(what)
        text, path = run_page(folder), out or folder.path / "report.html"
    else:
        if what not in group_options("study") and not is_file_name(what):
            raise UserError(f"{what} is neither a run folder nor a study: {suggest(what, group_options('study'))}")
        study = load_study(what, scale)
        text, path = study_page(study, results, runs), out or Path(f"{study.id}-{scale}.html")
    write_text_atomic(path, text)
    return path


def study_page(study: Study, results: Path, runs: Path) -> str:
    """Return the page of a study. It shows configuration and provenance of the runs whose folders are in `runs`.

    Raises:
        UserError: nothing was measured at this scale.
    """
    table, by_cell = table_of(study, results), curves_of(study, results)
    parts = [
        f"<h1>{_text(study.title)}</h1>",
        f"<p class='quiet'>Study {_text(study.id)}, scale <strong>{_text(study.scale)}</strong>. "
        f"{_text(answers_to(study))} {_text(duration(table))}</p>",
        *([f"<h2>{_text(table.caption())}</h2>", _wide(to_html(table.across()))] if "columns" in study.values else []),
        "<h2>Cell by cell, with the paper's numbers</h2>",
        "<label>Show cells with <input id='filter' type='search' placeholder='sn 8x2'></label>",
        _wide(_cells_table(table)),
        "<ul class='notes'>" + "".join(f"<li>{_text(line)}</li>" for line in table.footnotes()) + "</ul>",
        *_verdicts(judged_study(study, results)),
        *_figures([(figure.name, partial(figure.draw, figure.data)) for figure in figures_of(study, results)]),
        explorer(sets_of_study(study, results), in_epochs=not counts_steps(study)),
        "<h2>The runs</h2><div id='runs'>",
        *(_runs_of(study, cell, table.rows, by_cell.get(cell.name, {}), runs) for cell in study.cells),
        "</div>",
    ]
    return page(study.title, parts)


def run_page(folder: RunFolder) -> str:
    """Return the page of one run: result, curves, ratios, configuration, provenance.

    Raises:
        ValueError: the folder is not a run folder.
    """
    config, record = folder.read_config(), folder.read_record() or {}
    log = MetricsLog.read(folder.metrics_file)
    numbers = [(key, value) for key, value in record.items() if isinstance(value, int | float | str)]
    ratios, drawn = shares(validated(log)), list[Drawn]()
    if not ratios.empty:
        drawn = [("ratios", partial(stacked, ratios, "")), ("ratios over epochs", partial(dynamics, ratios, ""))]
    state = "" if record else " It has not finished."
    result = Grid(("what", "value"), [[Entry(key), Entry(_number(value))] for key, value in numbers])
    parts = [
        f"<h1>{_text(folder.path.name)}</h1>",
        f"<p class='quiet'>{_text(config['model']['name'])}, {_text(config['norm']['name'])}, batch "
        f"{_text(config['batch'])}, data {_text(config['data']['name'])}, seed {config['seed']}.{state}</p>",
        "<h2>Result</h2>",
        f"<div id='result'>{_wide(to_html(result))}</div>",
        "<h2>Curves</h2>",
        *_run_curves(log, metrics_of(config)[0]),
        *_figures(drawn),
        explorer_of_run(folder, config, ratios),
        "<h2>Origin of the run</h2>",
        *_origin(folder),
    ]
    return page(folder.path.name, parts)


def _text(text: str) -> str:
    return html.escape(text)


def _number(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _wide(content: str) -> str:
    """Make a table or figure scroll sideways in a narrow window, with a hint on the page."""
    return f"<div class='wide'><div class='scroller'>{content}</div></div>"


def _slug(cell: Cell) -> str:
    return "cell-" + "-".join(value for _, value in cell.key).replace(" ", "-")


def _searched(study: Study, cell: Cell) -> str:
    """Return the text that the filter searches: the values as typed and as shown."""
    return " ".join([cell.name, *(study.label(value) for _, value in cell.key)])


def _cells_table(table: StudyTable) -> str:
    """Return the table cell by cell. The first entry of each row is a link to the cell's runs."""
    grid = table.by_cell()
    head = "".join(f"<th>{_text(text)}</th>" for text in grid.heads)
    rows = []
    for cell, row in zip(table.study.cells, grid.rows, strict=True):
        first, *rest = row
        linked = f"<td><a href='#{_text(_slug(cell))}'>{_text(first.text)}</a></td>"
        rest_html = "".join(f"<td{' class=best' if bold else ''}>{_text(text)}</td>" for text, bold in rest)
        rows.append(f"<tr data-name='{_text(_searched(table.study, cell))}'>{linked}{rest_html}</tr>")
    return f"<table id='cells'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _verdicts(judged: Judged) -> list[str]:
    if not judged.comparisons:
        return []
    known = claims_of(judged.study)
    said = "".join(f"<li><strong>{_text(c)}</strong>: {_text(known[c].claim)}</li>" for c in judged.comparisons)
    table = f"<div id='verdicts'>{_wide(to_html(grid_of(judged)))}</div>"
    return ["<h2>Verdicts</h2>", table, f"<ul class='notes'>{said}</ul>"]


def _run_curves(log: Sequence[dict[str, Any]], primary: Metric) -> list[str]:
    """Return the figures of loss, primary metric and learning rate of a run, and its best epoch."""
    best = best_epoch(log, primary)
    if best is None:
        return ["<p>No epoch has ended yet.</p>"]
    last = validated(log)[-1]
    said = (
        f"Best epoch: {best.epoch}, with a validation {primary.label} of {primary.written(best.value)}. "
        f"Last epoch: {last['epoch']}, with {primary.written(last[primary.key])}."
    )
    shown = "".join(f"<figure>{_wide(_image(name, draw))}</figure>" for name, draw in curves(log, primary))
    return [f"<p>{said}</p>", f"<div class='panels'>{shown}</div>"]


def _figures(figures: Sequence[Drawn]) -> list[str]:
    """Return the figures, of which the page shows one at a time, and the control that selects it."""
    if not figures:
        return []
    names = "".join(f"<option>{_text(name)}</option>" for name, _ in figures)
    shown = [
        f"<figure data-name='{_text(name)}'{' hidden' if index else ''}>{_wide(_image(name, draw))}</figure>"
        for index, (name, draw) in enumerate(figures)
    ]
    return ["<h2>Figures</h2>", f"<label>Figure <select id='chosen'>{names}</select></label>", *shown]


def _image(name: str, draw: Callable[[], Figure]) -> str:
    """Return a figure that shrinks with the window while its smallest letters stay readable."""
    stream = io.BytesIO()
    with rc_context(STYLE):
        figure = draw()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    sizes = [float(text.get_fontsize()) for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    readable = min(1.0, SMALLEST / (min(sizes) / POINTS * PIXELS))
    encoded = base64.b64encode(stream.getvalue()).decode()
    return (
        f"<img alt='{_text(name)}' style='min-width: {readable * figure.get_figwidth() * PIXELS:.0f}px' "
        f"src='data:image/svg+xml;base64,{encoded}'>"
    )


def curves_of(study: Study, results: Path) -> dict[str, dict[int, Curve]]:
    """Return the primary metric in validation after each epoch, by cell and seed."""
    found: dict[str, dict[int, Curve]] = {}
    for row in read_records(results, study.id, "epochs"):
        if row["scale"] == study.scale:
            seeds = found.setdefault(row["cell"], {})
            seeds.setdefault(int(row["seed"]), []).append((float(row["epoch"]), float(row[PRIMARY])))
    return found


def _runs_of(study: Study, cell: Cell, rows: Sequence[Row], by_seed: Mapping[int, Curve], runs: Path) -> str:
    """Return the runs of one cell: command, result of each seed, curves, configuration and provenance."""
    metric = study.metrics[0]
    own = [r for r in rows if (r["scale"], r["cell"], r["metric"]) == (study.scale, cell.name, metric)]
    values = measured(study, rows, metric).get(cell.name)
    summary = _text(cell.name) + (
        f": {column_of(study, metric).heading} {values.mean:.2f}" if values else ": not measured yet"
    )
    chosen = [word for axis, value in cell.key for word in ("--only", f"{axis}={value}")]
    command = shlex.join(["exnorm", "reproduce", study.named, "--scale", study.scale, *chosen])
    settings = " ".join(["exnorm train", *(shlex.quote(text) for text in cell.train)])
    settings += f"\nexnorm eval RUN_DIR {shlex.join(cell.evaluate)}" if cell.evaluate else ""
    grid = Grid(KEPT, [[Entry(row[name]) for name in KEPT] for row in own])
    parts = [
        f"<pre>{_text(command)}\n\nThis runs, for each seed N, with seed=N:\n{_text(settings)}</pre>",
        _wide(to_html(grid)) if own else "",
        _curves(by_seed, study.primary) if by_seed else "",
    ]
    for row in own:
        for folder in sorted(runs.glob(f"*/{glob.escape(row['run'])}")):
            parts += [f"<h3>seed {row['seed']}</h3>", *_origin(RunFolder(folder))]
    head = (
        f"<details id='{_text(_slug(cell))}' data-name='{_text(_searched(study, cell))}'><summary>{summary}</summary>"
    )
    return f"{head}{''.join(parts)}</details>"


def _origin(folder: RunFolder) -> list[str]:
    """Return configuration and provenance of a run, as stored in its folder."""
    found = []
    for name, file in (("configuration", folder.config_file), ("provenance", folder.provenance_file)):
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            found.append(f"<details><summary>{name}</summary><pre>{_text(text)}</pre></details>")
    return found


def _curves(by_seed: Mapping[int, Curve], primary: Metric) -> str:
    """Return small curves of all seeds: the primary metric over the epochs, from 0 to 100 % or to its largest value."""
    top = 100.0 if primary.unit == "%" else max(value for points in by_seed.values() for _, value in points) or 1.0
    last = max(epoch for points in by_seed.values() for epoch, _ in points)
    lines = []
    for points in by_seed.values():
        places = " ".join(
            f"{WIDTH * (epoch - 1) / max(last - 1, 1):.1f},{HEIGHT * (1 - value / top):.1f}" for epoch, value in points
        )
        lines.append(f"<polyline points='{places}' fill='none' stroke='#0a58a8' stroke-width='1.5'/>")
    final = ", ".join(f"{points[-1][1]:.2f}" for points in by_seed.values())
    label = f"validation {primary.label} over {last:.0f} epochs, at the end {final}"
    return (
        f"<figure><svg role='img' aria-label='{label}' width='{WIDTH}' height='{HEIGHT}' "
        f"viewBox='0 -2 {WIDTH} {HEIGHT + 4}' style='border-bottom:1px solid #d8dbe0'>{''.join(lines)}</svg>"
        f"<figcaption class='quiet'>{label}</figcaption></figure>"
    )

"""Write the records of a study from its run folders. They can be made again at any time from existing folders."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.groups import group_options
from exnorm.config.metrics import Metric, metrics_of
from exnorm.config.study import Study, load_study
from exnorm.runs.folder import RunFolder, read_json
from exnorm.runs.layer_ratios import (
    LARGE_KL,
    bottom_middle_top,
    read_class_ratios,
    read_label_ratios,
    shares,
    symmetric_kl,
)
from exnorm.runs.metrics import MetricsLog, validated
from exnorm.runs.records import (
    COLUMNS,
    DIVERGED_AT,
    KEY,
    PRIMARY,
    TRAIN,
    Key,
    Row,
    Rows,
    change_records,
    key_of,
    read_records,
    record_file,
    recorded,
)
from exnorm.studies.plan import CLASSES, Job, jobs_of

DIGITS = 6  # significant digits of a value
RATIO_DIGITS = 4


def key_of_job(study: Study, job: Job) -> Key:
    """Return the key of a job's rows in the record."""
    return study.scale, job.name, str(job.seed)


def kinds_of(study: Study, job: Job) -> tuple[str, ...]:
    """Return the kinds of rows that the study records of a job."""
    followed = job.cell in study.followed and job.seed == 0
    return ("runs", "epochs", *(["layers"] if followed else []), *job.looks)


def rows_of(study: Study, job: Job) -> Rows:
    """The rows of a finished run, of each kind; of one that diverged the step, of any other unfinished one none.

    Raises:
        UserError: a damaged run.
    """
    nothing: Rows = {kind: [] for kind in COLUMNS}
    folder = job.folder()
    if folder is None or job.cell is None:
        return nothing
    key = dict(zip(KEY, key_of_job(study, job), strict=True))
    if not job.finished():
        step = folder.diverged_at()
        row = {
            **key,
            **origin_of(folder, job),
            **dict.fromkeys(("facts", "hours", "device"), ""),
            "metric": DIVERGED_AT,
        }
        return nothing if step is None else {**nothing, "runs": [{**row, "value": str(step)}]}
    record = folder.read_record()
    result = job.evaluation() if job.cell.evaluate else record
    assert record is not None and result is not None
    log = MetricsLog.read(folder.metrics_file)
    metrics = metrics_of(folder.read_config())
    _refuse_damaged(folder, record, log, metrics[0])
    origin = {
        **origin_of(folder, job),
        "facts": facts_of(folder.read_config(), record, result),
        "hours": f"{record['hours']:.4f}",
        "device": str(record["device"]),
    }
    measured = measured_by(metrics, record, result, log)
    own = not job.cell.evaluate  # the curves of an evaluation's run are those of another cell
    return {
        **nothing,
        "runs": [{**key, **origin, "metric": name, "value": _number(value)} for name, value in measured.items()],
        "epochs": [{**key, **row} for row in curves_of(log, metrics[0].name)] if own else [],
        "layers": [{**key, **row} for row in layers_of(log)] if "layers" in kinds_of(study, job) else [],
        **{look: [{**key, **row} for row in _looked(job, look, own)] for look in job.looks},
    }


def _refuse_damaged(folder: RunFolder, record: dict[str, Any], log: list[dict[str, Any]], primary: Metric) -> None:
    """Refuse a run without its last epoch, since its rows would replace complete ones.

    Raises:
        UserError: the last epoch is missing in record.json or metrics.jsonl.
    """
    steps, value = record.get("steps"), record.get(primary.key)
    if value is None or not any(row.get("step") == steps for row in validated(log)):
        raise UserError(
            f"{folder.path} is damaged: the last epoch is missing in record.json or metrics.jsonl. The record is left "
            "as it is. Remove the folder to train the run again"
        )


def origin_of(folder: RunFolder, job: Job) -> Row:
    """Return the versions and commits that made a run, at its first start and at each resume."""
    provenance = read_json(folder.provenance_file) or {}
    starts = [provenance, *provenance.get("resumed", ())]
    states = [start.get("git") or {} for start in starts]
    return {
        "torch": _each(start.get("versions", {}).get("torch", "") for start in starts),
        "commit": _each(state.get("commit", "")[:12] for state in states),
        "uncommitted": "yes" if any(state.get("dirty") for state in states) else "no",
        "config_hash": job.result_hash or "",
        "run": folder.path.name,
    }


def _each(texts: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(filter(None, texts)))


def curves_of(log: list[dict[str, Any]], primary: str) -> list[Row]:
    """Return the primary metric in training and in validation, and the validation loss, after each epoch."""
    names = {"epoch": "epoch", TRAIN: f"train/{primary}", PRIMARY: f"val/{primary}", "loss": "val/loss"}
    return [{column: _number(row.get(name)) for column, name in names.items()} for row in validated(log)]


def layers_of(log: list[dict[str, Any]]) -> list[Row]:
    """Return the ratios of all layers after the last epoch, and of a bottom, a middle and a top layer after each."""
    frame: Any = shares(log)
    if frame.empty:
        return []
    followed = frame.layer.isin(bottom_middle_top(list(frame.layer.unique())))
    kept = frame[(frame.epoch == frame.epoch.max()) | followed]
    rows: list[dict[str, Any]] = kept.to_dict("records")
    return [_texts(row) for row in rows]


def _looked(job: Job, look: str, own: bool) -> list[Row]:
    """Return the rows of what `exnorm ratios` measured of a run."""
    file = job.look_file(look)
    return classes_of(file, own) if look == CLASSES else labels_of(file)


def labels_of(file: Path) -> list[Row]:
    """Return how well the ratios of each layer tell wrong labels."""
    rows: list[dict[str, Any]] = read_label_ratios(file).to_dict("records")
    return [
        {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in rows
    ]


def classes_of(file: Path, own: bool) -> list[Row]:
    """Return the ratios by class. For an evaluation on other data, only those after the last epoch."""
    frame: Any = read_class_ratios(file).drop(columns="data")
    kept = frame if own else frame[frame.epoch == frame.epoch.max()]
    rows: list[dict[str, Any]] = kept.to_dict("records")
    return [_texts(row) for row in rows]


def _texts(row: dict[str, Any]) -> Row:
    """Return a row of ratios as texts for the record."""
    return {
        name: _number(value, RATIO_DIGITS) if name in ("mean", "std") else str(value) for name, value in row.items()
    }


def _number(value: Any, digits: int = DIGITS) -> str:
    return "" if value is None or value != value else f"{value:.{digits}g}"


def measured_by(
    metrics: Sequence[Metric], record: dict[str, Any], result: dict[str, Any], log: list[dict[str, Any]]
) -> dict[str, float]:
    """Return the metrics of a run: those of its task after the last epoch, its cost, and mean ratios over all layers.

    `result` is the record, or the evaluation that replaces it. `ratio_kl/large` is the share in % of SN's layers
    whose ratios of the mean and of the variance have a symmetric KL divergence above LARGE_KL.
    """
    epochs, primary = validated(log), metrics[0].name
    speeds = [row["images_per_s"] for row in epochs if row.get("images_per_s")]
    measured = {
        **{metric.name: result.get(metric.key) for metric in metrics},
        f"train_{primary}": epochs[-1].get(f"train/{primary}") if epochs else None,
        "updates": record["steps"],
        "images_per_s": statistics.median(speeds) if speeds else None,
        "parameters_m": record["parameters"] / 1e6,
        "gflops": record["gflops_per_image"],
    }
    measured |= {f"ratio/{name}": share for name, share in record.get("ratio", {}).items()}
    last = shares(log).query("epoch == epoch.max()")
    if {"mean", "var"} <= set(last.kind):
        sides = [
            last.query("kind == @kind").pivot_table(index="layer", columns="normalizer", values="mean", sort=False)
            for kind in ("mean", "var")
        ]
        measured["ratio_kl/large"] = 100 * float((symmetric_kl(*sides) > LARGE_KL).mean())
    return {name: float(value) for name, value in measured.items() if value is not None}


def facts_of(config: dict[str, Any], record: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the settings for the footnotes: inference, devices, dropout, and the number of excluded images."""
    facts = {"inference": result.get("inference", record["inference"])}
    if result.get("calibration_batches"):
        facts["calibration_batches"] = result["calibration_batches"]
    if record.get("devices", 1) > 1:
        facts["devices"] = record["devices"]
    if config["model"]["drop_rate"]:
        facts["drop_rate"] = config["model"]["drop_rate"]
    facts |= excluded_images(record, result)
    return " ".join(f"{name}={value}" for name, value in facts.items())


def excluded_images(record: dict[str, Any], result: dict[str, Any]) -> dict[str, int]:
    """Return how many images `data.exclude` left out of training and of the validation set behind the accuracy.

    A record counts them by split, with the validation sets in their order. An evaluation counts those of its own set.
    """
    splits: dict[str, int] = record.get("excluded_images", {})
    of_run = next((count for split, count in splits.items() if split.startswith("val/")), 0)
    found = {
        "excluded_train_images": splits.get("train", 0),
        "excluded_val_images": result.get("images_excluded", of_run),
    }
    return {name: count for name, count in found.items() if count}


def add_to_record(study: Study, job: Job, results: Path) -> None:
    """Write the rows of a run into the study's record. They replace earlier rows of this cell and seed."""
    found = {key_of_job(study, job): rows_of(study, job)}
    change_records(results, study.id, lambda before: with_results(study, before, found), primary=study.primary.name)


def with_results(study: Study, before: Rows, found: Mapping[Key, Rows], dropped: Collection[Key] = ()) -> Rows:
    """Return the rows of a record with those of the results that were found, in place of their earlier ones."""
    return {
        kind: in_order(
            study,
            [
                *(row for row in before[kind] if key_of(row) not in found and key_of(row) not in dropped),
                *(row for rows in found.values() for row in rows[kind]),
            ],
        )
        for kind in COLUMNS
    }


def collect(study: Study, jobs: Sequence[Job], results: Path) -> tuple[list[str], dict[str, str]]:
    """Bring the record up to date with the run folders.

    Rows of runs that are not here, or damaged, are kept, as long as the study still has that cell with that
    configuration.

    Returns:
        A line for each thing that was left out, and what is damaged, by the title of its job.
    """
    found, damaged = _rows_of_runs(study, [job for job in jobs if job.cell is not None])
    hashes = {job.name: job.result_hash for job in jobs if job.cell is not None}
    outdated: dict[Key, str] = {}

    def change(before: Rows) -> Rows:
        problems = ((key_of(row), _outdated(study, row, hashes)) for row in before["runs"])
        outdated.update({key: problem for key, problem in problems if problem is not None})
        return with_results(study, before, found, outdated)

    change_records(results, study.id, change, primary=study.primary.name)
    left_out = [problem for key, problem in outdated.items() if key not in found]
    return [*left_out, *_other_runs(study, jobs), *_without_snapshots(jobs)], damaged


def _rows_of_runs(study: Study, jobs: Iterable[Job]) -> tuple[dict[Key, Rows], dict[str, str]]:
    """The rows of each finished run by its key, and what is damaged by the title of its job."""
    found: dict[Key, Rows] = {}
    damaged: dict[str, str] = {}
    for job in jobs:
        try:
            rows = rows_of(study, job)
        except UserError as problem:
            damaged[job.title] = str(problem)
        else:
            if rows["runs"]:
                found[key_of_job(study, job)] = rows
    return found, damaged


def stale_rows(results: Path) -> list[str]:
    """Return a line for each recorded run whose configuration is not the one that its study asks for now.

    Runs whose data are not on this machine cannot be compared and get no line.
    """
    lines: dict[str, None] = {}
    for name in (name for name in recorded(results) if name in group_options("study")):
        rows = read_records(results, name)
        for scale in dict.fromkeys(row["scale"] for row in rows):
            study = load_study(name, scale)
            hashes = {job.name: job.result_hash for job in jobs_of(study, study.cells, Path()) if job.cell is not None}
            problems = (_outdated(study, row, hashes) for row in rows)
            lines |= dict.fromkeys(f"{record_file(results, name)}: {problem}" for problem in problems if problem)
    return list(lines)


def _without_snapshots(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each run that was trained before the study asked for a snapshot of it."""
    notes = []
    for job in (job for job in jobs if CLASSES in job.looks or job.cell is None):
        missing, folder = job.missing_snapshots(), job.folder()
        if missing and folder is not None:
            shares = ", ".join(f"{share:g}" for share in missing)
            notes.append(
                f"{folder.path} has no snapshot after {shares} of its epochs. Results that need it are left out. "
                "Remove the folder to train the run again"
            )
    return list(dict.fromkeys(notes))


def _outdated(study: Study, row: Row, hashes: dict[str, str | None]) -> str | None:
    """Return why a row of a record is outdated; None if it is not."""
    if row["scale"] != study.scale:
        return None
    where = f"outdated row: {row['cell']}, seed {row['seed']}"
    if row["cell"] not in {cell.name for cell in study.cells}:
        return f"{where}: {study.id} no longer has this cell"
    wanted = hashes.get(row["cell"])
    if wanted is not None and row["config_hash"] != wanted:
        return f"{where}: made with the configuration {row['config_hash']}; the study now asks for {wanted}"
    return None


def _other_runs(study: Study, jobs: Sequence[Job]) -> list[str]:
    """Return a line for each finished run of these cells and seeds that the study no longer asks for."""
    if not jobs:
        return []
    wanted = {folder.path for job in jobs if (folder := job.folder()) is not None}
    asked = {(study.id, study.scale, job.name, job.seed) for job in jobs}
    notes = []
    for file in sorted(jobs[0].runs.glob("*/*/provenance.json")):
        origin = (read_json(file) or {}).get("study") or {}
        ours = tuple(origin.get(name) for name in ("id", "scale", "cell", "seed")) in asked
        if ours and (file.parent / "record.json").is_file() and file.parent not in wanted:
            notes.append(
                f"outdated run: {file.parent}, made for {origin.get('cell')}: the study now asks for another run"
            )
    return notes


def in_order(study: Study, rows: list[Row]) -> list[Row]:
    """Sort rows by scale, and those of the study's scale by cell in its order and by seed.

    The rows of one run and those of other scales, which have other cells, keep their order.
    """
    order = {cell.name: position for position, cell in enumerate(study.cells)}

    def place(row: Row) -> tuple[str, int, int]:
        if row["scale"] != study.scale:
            return row["scale"], 0, 0
        return row["scale"], order.get(row["cell"], len(order)), int(row["seed"])

    return sorted(rows, key=place)

"""The small table at the end of a run or an evaluation. Imports no torch."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from exnorm.config.metrics import Metric, metrics_of
from exnorm.runs.folder import RunFolder
from exnorm.runs.identity import run_dir
from exnorm.runs.table import print_table

NORMALIZERS = ("in", "ln", "bn")


def print_result(folder: RunFolder) -> None:
    """Print a finished run: the task's metrics, time, mean ratios, the folder, and what a user may type next.

    The last line says how many training images were replaced, if any were.
    """
    record, config = folder.read_record(), folder.read_config()
    if record is None:
        return
    cells = _measured(metrics_of(config), record) | {"train time": _minutes(record["hours"] * 60)}
    ratio = record.get("ratio") or {}
    if ratio:
        names = [name for name in NORMALIZERS if name in ratio]
        cells["mean ratio " + " / ".join(name.upper() for name in names)] = " / ".join(
            f"{ratio[name]:.3f}" for name in names
        )
    _print_table(cells)
    print(f"run folder: {folder.path}")
    if config["data"]["name"] == "digits":
        norm, model = config["norm"]["name"], config["model"]["name"]
        print(f"the same on ImageNet: exnorm train model={model} norm={norm} batch=8x32 data=imagenet data.root=DIR")
    offline = [path for path in sorted(folder.wandb_dir.glob("offline-run-*")) if not any(path.glob("*.synced"))]
    if offline:
        print(f"to upload it to W&B: {shlex.join(['wandb', 'sync', *map(str, offline)])}")
    if replaced := record.get("bad_images"):
        file = folder.bad_images_file
        print(
            f"{replaced} broken training image{'s were' if replaced > 1 else ' was'} replaced by others of the same "
            f"label. {file} lists them; a run with data.exclude={file} leaves them out."
        )


def print_shorter(folder: RunFolder, config: dict[str, Any], identity: Callable[[dict[str, Any]], str]) -> None:
    """Print which run with the same settings but fewer epochs has finished, and how to start from its weights.

    Args:
        folder, config: the new run and its resolved configuration.
        identity: returns the hash of a resolved configuration and its data.
    """
    alike = folder.path.parent.glob(run_dir(config, hash8="*").name)
    lengths = {_finished_epochs(RunFolder(path)) for path in alike}
    for epochs in sorted((number for number in lengths if 0 < number < config["trainer"]["epochs"]), reverse=True):
        shorter = {**config, "trainer": {**config["trainer"], "epochs": epochs}}
        path = run_dir(shorter, hash8=identity(shorter))
        if _finished_epochs(RunFolder(path)):
            print(
                f"{path} has finished the same training with trainer.epochs={epochs}. This run starts from the "
                "beginning, because the learning rate follows the number of epochs. To start from the weights of that "
                f"run instead, add model.init_from={path}"
            )
            return


def _finished_epochs(folder: RunFolder) -> int:
    """Return the epochs of a finished run; 0 for any other folder."""
    return (folder.read_record() or {}).get("epochs", 0)


def print_evaluations(rows: list[dict[str, Any]], metrics: Sequence[Metric]) -> None:
    """Print evaluations, one row each: the task's metrics, and what they were measured on."""
    _print_table(
        *(
            {
                **_measured(metrics, row),
                "images": str(row["images"]),
                "data": row["data"],
                "checkpoint": f"{row['checkpoint']} (step {row['step']})",
                "inference": row["inference"],
                **({"test": row["test"]} if "test" in row else {}),
            }
            for row in rows
        )
    )


def _print_table(*rows: dict[str, str]) -> None:
    table = Table(*rows[0])
    for cells in rows:
        table.add_row(*cells.values())
    print_table(table)


def _measured(metrics: Sequence[Metric], result: Mapping[str, float | None]) -> dict[str, str]:
    """Return the metrics of a record or an evaluation, by their headings."""
    return {metric.heading: metric.number(result.get(metric.key)) for metric in metrics}


def _minutes(minutes: float) -> str:
    return f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.1f} min"

"""The small table at the end of a run or an evaluation. Imports no torch."""

from typing import Any

from rich.table import Table

from exnorm.runs.folder import RunFolder
from exnorm.runs.table import print_table

NORMALIZERS = ("in", "ln", "bn")


def print_result(folder: RunFolder) -> None:
    """A finished run: accuracy, loss, time, mean ratios, the folder, and the same command on ImageNet."""
    record, config = folder.read_record(), folder.read_config()
    if record is None:
        return
    cells = {
        "top-1 %": f"{record['val/top1']:.2f}",
        "top-5 %": f"{record['val/top5']:.2f}",
        "loss": _loss(record["val/loss"]),
        "train time": _minutes(record["hours"] * 60),
    }
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


def print_evaluations(rows: list[dict[str, Any]]) -> None:
    """Evaluations, one row each: accuracy and loss, and what they were measured on."""
    _print_table(
        *(
            {
                "top-1 %": f"{row['val/top1']:.2f}",
                "top-5 %": f"{row['val/top5']:.2f}",
                "loss": _loss(row["val/loss"]),
                "images": str(row["images"]),
                "data": row["data"],
                "checkpoint": f"{row['checkpoint']} (step {row['step']})",
                "inference": row["inference"],
            }
            for row in rows
        )
    )


def _print_table(*rows: dict[str, str]) -> None:
    table = Table(*rows[0])
    for cells in rows:
        table.add_row(*cells.values())
    print_table(table)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _minutes(minutes: float) -> str:
    return f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.1f} min"

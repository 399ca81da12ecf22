"""What the benchmarks share: interleaved timing, bytes saved for backward, and rows with their provenance.

A ratio is taken within one round, in which every candidate runs once, so that a machine that slows down slows down
all of them.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from exnorm import __version__
from exnorm.runs.provenance import collect, cpu_model
from exnorm.runs.table import print_table

TABLES = Path("results") / "bench"
HEADING = """# Speed and memory
Measured by `exnorm bench norms`, `exnorm bench train` and `exnorm bench data`, which append to the CSV files here, with
device, versions and commit, and write this page. A ratio is the median over rounds in which all candidates ran in turn.
"""


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, step in candidates.items():
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds' ratios."""
    values = [own / other for own, other in zip(seconds, baseline, strict=True)]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"ratio": round(middle, 3), "ratio_q25": round(low, 3), "ratio_q75": round(high, 3)}


def saved_bytes(forward: Callable[[], Any], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that a forward saves for its backward, each counted once, without the given tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    found: dict[int, int] = {}
    kept: list[Any] = []  # a storage that was freed could be counted again under its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(forward())
    return sum(found.values())


def bench_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name that a row carries: the GPU's, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def append(path: Path, rows: list[dict[str, Any]], *, device: torch.device) -> None:
    """Append rows to a CSV, each with time, device, versions and commit, and write the tables of its folder anew."""
    facts = collect([])
    origin = {
        "time": facts["time"],
        "device": device_name(device),
        "python": facts["python"],
        "torch": facts["versions"]["torch"],
        "timm": facts["versions"]["timm"],
        "exnorm": __version__,
        "commit": (facts["git"] or {}).get("commit", ""),
        "uncommitted": bool((facts["git"] or {}).get("dirty", False)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*origin, *rows[0]])
        if fresh:
            writer.writeheader()
        writer.writerows([{**origin, **row} for row in rows])
    write_tables(path.parent)


def write_tables(folder: Path) -> None:
    """`README.md` with the newest row of each thing that the CSVs of a folder hold."""
    parts = [HEADING.rstrip()]
    if (folder / "norms.csv").exists():
        rows = newest(folder / "norms.csv", ["device", "shape", "layer"])
        for device, group in rows.groupby("device", sort=False):
            ratio = group.pivot_table(index="layer", columns="shape", values="ratio", sort=False, aggfunc="last")
            saved = group.pivot_table(index="layer", columns="shape", values="saved_mib", sort=False, aggfunc="last")
            note = f"On {device}; torch {group.torch.iloc[-1]}; last, MiB saved for backward at {saved.columns[0]}."
            ratio["MiB saved"] = saved[saved.columns[0]]
            parts += ["## One layer with its ReLU, forward and backward: time over `torch bn`", note, markdown(ratio)]
    if (folder / "train.csv").exists():
        rows = newest(folder / "train.csv", ["device", "model", "image_size", "batch", "precision", "layers"])
        columns = ["image_size", "batch", "precision", "layers", "images_per_s", "ratio", "ratio_q25", "ratio_q75"]
        columns += ["saved_mib", "peak_mib", "first_step_s"]
        for device, group in rows.groupby("device", sort=False):
            torch_version = group.torch.iloc[-1]
            note = f"On {device}; torch {torch_version}; `ratio` is the time of a step over timm's: below 1 is faster."
            parts += ["## Training steps", note, markdown(group.set_index("model").filter(columns).fillna(""))]
    if (folder / "data.csv").exists():
        rows = newest(folder / "data.csv", ["device", "data", "image_size", "workers"])
        columns = ["image_size", "workers", "loader", "bare_image_folder", "ratio", "ratio_q25", "ratio_q75"]
        columns += ["decode", "augment"]
        for device, group in rows.groupby("device", sort=False):
            note = (
                f"Images per second on {device}; `ratio` is the loader's speed over that of torchvision's ImageFolder "
                "in a bare DataLoader with the same transforms, so above 1 is faster; decoding and augmentation are of "
                "one core."
            )
            parts += ["## Loading images", note, markdown(group.set_index("data").filter(columns).fillna(""))]
    if (folder / "index.csv").exists():
        rows = newest(folder / "index.csv", ["device", "entries"])
        columns = ["first_s", "again_s", "mib_above_imports"]
        for device, group in rows.groupby("device", sort=False):
            note = f"A list file with so many entries, made ready by a process on {device}: first, and from the cache."
            parts += ["## The index of a data set", note, markdown(group.set_index("entries").filter(columns))]
    if (folder / "timm_coverage.csv").exists():
        rows = pd.read_csv(folder / "timm_coverage.csv")
        note = (
            f"`scripts/timm_coverage.py`: {rows.architecture.nunique()} architectures of timm {rows.timm.iloc[-1]} so "
            "far, each kind of their layers converted to EN and trained a step; what is too large for the memory on "
            "the meta device."
        )
        parts += ["## timm's architectures", note, markdown(coverage(rows))]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def coverage(rows: pd.DataFrame) -> pd.DataFrame:
    """Per kind of layer, and in all: architectures, converted ones, those of them on the meta device, failed ones."""
    rows = rows.query("result != 'nothing to convert'")
    lines = {}
    for kind, group in [*rows.fillna({"kind": "?"}).groupby("kind"), ("all", rows)]:
        failed = group[group.result == "failed"].architecture.nunique()
        total, on_meta = group.architecture.nunique(), group[group.device == "meta"].architecture.nunique()
        lines[kind] = [total, total - failed, f"{100 * (total - failed) / total:.1f} %", on_meta, failed]
    columns = ["architectures", "converted", "share", "on meta", "failed"]
    return pd.DataFrame.from_dict(lines, orient="index", columns=columns).rename_axis("kind")


def newest(path: Path, key: list[str]) -> pd.DataFrame:
    """The last row of each key."""
    return pd.DataFrame(pd.read_csv(path).drop_duplicates(key, keep="last"))


def markdown(frame: pd.DataFrame) -> str:
    """A data frame as a Markdown table, its index first."""
    lines = [[frame.index.name, *frame.columns], ["---"] * (len(frame.columns) + 1)]
    lines += [[index, *row] for index, row in zip(frame.index, frame.itertuples(index=False), strict=True)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a table on the terminal."""
    table = Table(*rows[0], title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    print_table(table)

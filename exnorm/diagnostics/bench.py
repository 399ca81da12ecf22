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

import torch
from rich.table import Table
from torch import Tensor

from exnorm import __version__
from exnorm.diagnostics.bench_tables import write_tables
from exnorm.runs.provenance import collect, cpu_model
from exnorm.runs.table import print_table

TABLES = Path("results") / "bench"


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


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a table on the terminal."""
    table = Table(*rows[0], title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    print_table(table)

"""The page `results/bench/README.md`: a table for each CSV file of the benchmarks, with the newest rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

TITLE = """# Speed and memory
`exnorm bench norms`, `exnorm bench train` and `exnorm bench data` append rows to the CSV files here, with device,
versions and commit, and write this page. `scripts/gpu_visit.py` writes the rows for `gpu.csv`. A ratio is the median
over rounds in which all candidates ran in turn.
"""


def write_tables(folder: Path) -> None:
    """Write `README.md` with the newest row of each thing that the CSVs of a folder hold."""
    parts = [TITLE.rstrip()]
    for name, section in SECTIONS.items():
        if (folder / name).exists():
            parts += section(folder / name)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _norms(path: Path) -> Iterator[str]:
    for device, group in _by_device(path, ["shape", "layer"]):
        ratio = group.pivot_table(index="layer", columns="shape", values="ratio", sort=False, aggfunc="last")
        saved = group.pivot_table(index="layer", columns="shape", values="saved_mib", sort=False, aggfunc="last")
        ratio["MiB saved"] = saved[saved.columns[0]]
        yield "## One layer with its ReLU, forward and backward: time over `torch bn`"
        yield f"On {device}; torch {group.torch.iloc[-1]}; last, MiB saved for backward at {saved.columns[0]}."
        yield markdown(ratio)


def _train(path: Path) -> Iterator[str]:
    columns = ["image_size", "batch", "precision", "layers", "images_per_s", "ratio", "ratio_q25", "ratio_q75"]
    columns += ["saved_mib", "peak_mib", "first_step_s"]
    for device, group in _by_device(path, ["model", "image_size", "batch", "precision", "layers"]):
        torch_version = group.torch.iloc[-1]
        yield "## Training steps"
        yield f"On {device}; torch {torch_version}; `ratio` is the time of a step over timm's: below 1 is faster."
        yield markdown(group.set_index("model").filter(columns).fillna(""))


def _data(path: Path) -> Iterator[str]:
    columns = ["image_size", "workers", "loader", "bare_image_folder", "ratio", "ratio_q25", "ratio_q75"]
    columns += ["decode", "augment"]
    for device, group in _by_device(path, ["data", "image_size", "workers"]):
        yield "## Loading images"
        yield (
            f"Images per second on {device}; `ratio` is the loader's speed over that of torchvision's ImageFolder "
            "in a bare DataLoader with the same transforms, so above 1 is faster; decoding and augmentation are of "
            "one core."
        )
        yield markdown(group.set_index("data").filter(columns).fillna(""))


def _index(path: Path) -> Iterator[str]:
    columns = ["first_s", "again_s", "mib_above_imports"]
    for device, group in _by_device(path, ["entries"]):
        yield "## The index of a data set"
        yield f"A list file with so many entries, made ready by a process on {device}: first, and from the cache."
        yield markdown(group.set_index("entries").filter(columns))


def _scale(path: Path) -> Iterator[str]:
    for device, group in _by_device(path, ["part", "what"]):
        yield "## At scale"
        yield (
            f"`scripts/at_scale.py` on {device} and its local disk; [what follows](../../docs/at-scale.md) for large "
            "data sets, studies and jobs."
        )
        table = group.set_index("what").filter(["value", "unit"])
        yield markdown(
            table.assign(value=[f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in table.value])
        )


def _timm_coverage(path: Path) -> Iterator[str]:
    rows = pd.read_csv(path)
    yield "## timm's architectures"
    yield (
        f"`scripts/timm_coverage.py`: {rows.architecture.nunique()} architectures of timm {rows.timm.iloc[-1]} so "
        "far, each kind of their layers converted to EN and trained a step; what is too large for the memory on "
        "the meta device."
    )
    yield markdown(coverage(rows))


# What is to be reached on a GPU: images, whether in a CUDA graph, whether torch.compile takes the model; speed / stock.
GPU_BARS = {
    (256, False, False): 1.03,
    (256, False, True): 0.97,
    (256, True, False): None,
    (256, True, True): None,
    (32, True, False): 1.0,
    (32, False, False): None,
    (8, True, False): 1.0,
    (8, False, False): None,
}
GPU_NORMS = ("en", "sn", "gn", "bn")
VISIT = pd.Timedelta("1h")  # rows that are closer in time than this were measured on one visit to a GPU
PEAK_BAR = 1.02


def _gpu(path: Path) -> Iterator[str]:
    rows = pd.read_csv(path).query("images_per_s.notna()").astype({"batch": int})
    rows["graph"] = rows.graph.fillna(False).astype(bool)
    rows["whole"] = rows.backend.fillna("").str.endswith("whole model")
    rows["time"] = pd.to_datetime(rows.time)
    for device, group in rows.groupby("device", sort=False):
        lines = [_gpu_line(group, setting, bar) for setting, bar in GPU_BARS.items()]
        for whole, how in ((False, ""), (True, ", whole-model torch.compile")):
            peak = _gpu_ratios(group, (256, False, whole), "peak_gib")
            lines.append({"step": f"peak memory, 256 images{how}", **peak, "bar": f"at most {PEAK_BAR}"})
        yield f"## Training steps on one {device}"
        yield (
            f"`scripts/gpu_visit.py`; ResNet-50, 224 px, bfloat16, channels last, torch {group.torch.iloc[-1]}. Images "
            "per second over those of timm's model with torch's BN, on the same visit, under the same conditions. Each "
            "value is the last one measured; `gpu.csv` has the earlier ones, too."
        )
        yield markdown(pd.DataFrame(lines).set_index("step"))


def _gpu_line(rows: pd.DataFrame, setting: tuple[int, bool, bool], bar: float | None) -> dict[str, str]:
    batch, graph, whole = setting
    how = (", whole-model torch.compile" if whole else "") + (", CUDA graph" if graph else "")
    target = "" if bar is None else f"at least {bar}"
    return {"step": f"{batch} images{how}", **_gpu_ratios(rows, setting, "images_per_s"), "bar": target}


def _gpu_ratios(rows: pd.DataFrame, setting: tuple[int, bool, bool], column: str) -> dict[str, str]:
    """Each normalizer's last value over the one of stock that was measured next to it on the same visit."""
    batch, graph, whole = setting
    same = rows[(rows.batch == batch) & (rows.graph == graph) & (rows.whole == whole)]
    by_time = same.set_index("time").sort_index()
    stock = by_time.loc[by_time.norm == "stock", column]
    found = {}
    for norm in GPU_NORMS:
        values = by_time.loc[by_time.norm == norm, column]
        beside = stock.reindex(values.index, method="nearest", tolerance=VISIT) if len(stock) else values * float("nan")
        ratios = (values / beside).dropna()
        found[norm.upper()] = f"{ratios.iloc[-1]:.2f}" if len(ratios) else "not measured"
    return found


SECTIONS: dict[str, Callable[[Path], Iterator[str]]] = {
    "norms.csv": _norms,
    "train.csv": _train,
    "gpu.csv": _gpu,
    "data.csv": _data,
    "index.csv": _index,
    "scale.csv": _scale,
    "timm_coverage.csv": _timm_coverage,
}


def _by_device(path: Path, key: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The newest row of each key on each device, by device in the order of the file."""
    yield from newest(path, ["device", *key]).groupby("device", sort=False)  # type: ignore[misc]


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

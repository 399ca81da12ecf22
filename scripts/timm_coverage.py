"""Find the architectures of timm that convert to EN and train a step; write results/bench/timm_coverage.csv.

python scripts/timm_coverage.py                     all of them, a few hours on 2 cores; continues if it was stopped
python scripts/timm_coverage.py --only 'resnet*'    those that match; --again also measures those that have a row

The file has a row per architecture and kind of normalization layer (`replace=`). Each architecture runs as a
subprocess. The kind is converted to EN. Then a forward, a backward and a step of SGD must leave every parameter finite,
and every layer that ran must get gradients.

Kind `batch` is also converted to `bn`. This must not change the outputs in training and evaluation mode, in float64.
The tolerance is 1e-6, or more if a change of the input's last digit does more: some deep networks are chaotic before
they are trained. A model that needs more memory than --memory-gib runs on the meta device: shapes, no values.
"""

import csv
import fnmatch
import io
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import exnorm
from exnorm.config.errors import first_line
from exnorm.diagnostics.bench import TABLES, saved_bytes
from exnorm.diagnostics.bench_tables import write_tables
from exnorm.norms import Norm
from exnorm.runs.folder import write_text_atomic
from exnorm.runs.provenance import collect
from exnorm.surgery import KINDS

BATCH = 2
SMALL_PX = 128  # for a network that takes any size; 2 x 2 positions at a stride of 64
BN_TOLERANCE = 1e-6  # of the largest output, in float64
NOISE_FACTOR = 100  # rounding happens in every layer; the change of the input is only in the first
Row = dict[str, Any]


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the smallest sensible input of an architecture, (channels, height, width)."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if config.get("fixed_input_size"):
        return tuple(config["input_size"])
    if config.get("min_input_size"):
        return tuple(config["min_input_size"])
    return tuple(min(size, SMALL_PX) for size in config["input_size"])


def kinds_in(model: nn.Module) -> list[str]:
    """Return the kinds of normalization that a model has."""
    types = {type(module) for module in model.modules()}
    return [kind for kind, classes in KINDS.items() if types & set(classes)]


def build(name: str, device: str) -> nn.Module:
    """Return a new model with random values, the same each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return timm.create_model(name, pretrained=False)


def run(
    model: nn.Module, size: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, factor: float = 1
) -> list[Tensor]:
    """Return the floating-point outputs for a batch that is the same each time."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, *size, dtype=dtype).to(device) * factor
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def needed_gib(model: nn.Module) -> float:
    """Return the memory in GiB that a training step of a model on the meta device would need.

    This is what the backward keeps, plus four times the weights (float64 or gradients).
    """
    parameters = list(model.parameters())
    saved = saved_bytes(lambda: run(model.train(), input_size(model), "meta"), exclude=parameters)
    return (saved + 4 * sum(p.nbytes for p in parameters)) / 2**30


def train_step(model: nn.Module, size: tuple[int, ...], device: str) -> None:
    """Do a step of SGD. Assert that every normalizer that ran has gradients and that everything is finite."""
    ran: list[Norm] = []
    for module in model.modules():
        if isinstance(module, Norm):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = run(model.train(), size, device)
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    assert ran, "no converted layer ran"
    for norm in ran:
        missing = [name for name, p in norm.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"no gradient for {missing[0]} of a {norm.replaced}"
    optimizer.step()
    if device != "meta":
        assert all(y.isfinite().all() for y in outputs), "an output is not finite"
        bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        assert not bad, f"{bad[0]} is not finite after a step"


def bn_difference(name: str, size: tuple[int, ...]) -> Row:
    """Return how much our BN changes the outputs, relative to the largest output, and how much rounding does."""
    original = _with_values(build(name, "cpu").double())
    converted = exnorm.convert(_with_values(build(name, "cpu").double()), "bn", replace=("batch",))
    differences, noises = [], []
    for training in (False, True):

        def outputs(model: nn.Module, factor: float = 1, training: bool = training) -> list[Tensor]:
            with torch.no_grad():
                return run(model.train(training), size, "cpu", torch.float64, factor)

        expected = outputs(original)
        differences.append(_distance(outputs(converted), expected))
        noises.append(_distance(outputs(original, 1 + torch.finfo(torch.float64).eps), expected))
        allowed = max(BN_TOLERANCE, NOISE_FACTOR * noises[-1])
        assert differences[-1] <= allowed, f"bn differs by {differences[-1]:.1e}, rounding by {noises[-1]:.1e}"
    return {"bn_difference": f"{max(differences):.1e}", "bn_noise": f"{max(noises):.1e}"}


@torch.no_grad()
def _with_values(model: nn.Module) -> nn.Module:
    """Return the model with running statistics other than 0 and 1 and without zero parameters; the same each time."""
    torch.manual_seed(2)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("running_mean", "running_var")) or (isinstance(tensor, nn.Parameter) and not tensor.any()):
            tensor.add_(torch.rand_like(tensor) / 2)
    return model


def _distance(got: list[Tensor], expected: list[Tensor]) -> float:
    distances = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, expected, strict=True)]
    return float(torch.stack(distances).max())  # NaN if one is


def examine(name: str, memory_gib: float) -> Iterator[Row]:
    """Yield the rows of one architecture."""
    model = build(name, "meta")
    device = "cpu" if needed_gib(model) <= memory_gib else "meta"
    size, kinds = input_size(model), kinds_in(model)
    parameters_m = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    common = {"input": "x".join(map(str, (BATCH, *size))), "parameters_m": parameters_m}
    if not kinds:
        yield {**common, "result": "nothing to convert"}
    for kind in kinds:
        start, row = time.perf_counter(), {**common, "kind": kind, "device": device, "result": "converted"}
        try:
            converted = exnorm.convert(build(name, device), "en", replace=(kind,))
            norms = [module for module in converted.modules() if isinstance(module, Norm)]
            row |= {"layers": len(norms), "fused": sum(norm.fused_act is not None for norm in norms)}
            assert kind not in kinds_in(converted), f"layers of kind {kind} are left"
            train_step(converted, size, device)
            if kind == "batch" and device == "cpu":
                row |= bn_difference(name, size)
        except Exception as problem:  # noqa: BLE001  # any error is a result
            row |= failure(problem)
        yield {**row, "seconds": round(time.perf_counter() - start, 1)}


def failure(problem: Exception) -> Row:
    """Return the columns of a row that describe an error."""
    return {"result": "failed", "error": f"{type(problem).__name__}: {first_line(problem)}"[:200]}


def child(name: str, memory_gib: float, sender: Connection) -> None:
    """Send the rows of one architecture. Runs as a subprocess."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        sender.send(list(examine(name, memory_gib)))
    except Exception as problem:  # noqa: BLE001  # also an error of timm itself
        sender.send([failure(problem)])


def in_a_process(name: str, memory_gib: float, limit_s: float) -> list[Row]:
    """Return the rows of one architecture, or a row that says how its process ended."""
    context = multiprocessing.get_context("forkserver")  # torch and timm are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, memory_gib, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit_s):
            return receiver.recv()
        return [{"result": "failed", "error": f"took longer than {limit_s:g} s"}]
    except EOFError:
        process.join()
        return [{"result": "failed", "error": f"its process ended with code {process.exitcode}"}]
    finally:
        process.kill()
        process.join()


COLUMNS = ["architecture", "kind", "result", "device", "input", "parameters_m", "layers", "fused", "bn_difference"]
COLUMNS += ["bn_noise", "seconds", "error", "timm", "torch", "exnorm", "commit"]


def read(path: Path) -> dict[str, list[Row]]:
    """Return the rows of each architecture in a CSV; none if there is no file."""
    found: dict[str, list[Row]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["architecture"], []).append(row)
    return found


def write(path: Path, found: dict[str, list[Row]]) -> None:
    """Write the complete CSV, sorted by architecture, in place of the old one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for _, rows in sorted(found.items()):
        writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def main(
    only: Annotated[str, typer.Option(help="pattern of names, such as 'resnet*'")] = "*",
    again: Annotated[bool, typer.Option("--again", help="also measure what has a row")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 2,
    limit_s: Annotated[float, typer.Option(help="seconds for one architecture")] = 900,
    memory_gib: Annotated[float, typer.Option(help="of one process; larger models run on the meta device")] = 7,
    out: Annotated[Path, typer.Option(help="the CSV to continue")] = TABLES / "timm_coverage.csv",
) -> None:
    """Convert timm's architectures to EN, train a step with each, and record the results."""
    names = [name for name in timm.list_models() if fnmatch.fnmatch(name, only)]
    if not names:
        raise typer.BadParameter(f"no architecture of timm matches {only!r}; allowed: a pattern such as 'resnet*'")
    found = read(out)
    facts = collect([])
    origin = {"timm": timm.__version__, "torch": facts["versions"]["torch"], "exnorm": exnorm.__version__}
    origin["commit"] = (facts["git"] or {}).get("commit", "")[:12]
    todo = [n for n in names if again or not found.get(n) or any(r["result"] == "failed" for r in found[n])]
    out.parent.mkdir(parents=True, exist_ok=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["timm", "exnorm.surgery"])
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(in_a_process, name, memory_gib, limit_s): name for name in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                found[name] = [{"architecture": name, **row, **origin} for row in future.result()]
                write(out, found)
                for row in found[name]:
                    print(
                        f"{done}/{len(todo)}", name, *(row.get(k, "") for k in ("kind", "result", "error")), flush=True
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit(130)
    write_tables(out.parent)
    failed = [name for name in names if any(row["result"] == "failed" for row in found[name])]
    having = [name for name in names if any(row["result"] != "nothing to convert" for row in found[name])]
    print(f"{len(having) - len(failed)} of {len(having)} architectures with a normalization layer converted")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)

"""`exnorm export`: write a trained model in a format of other programs, and check what was written.

The file is written into a temporary folder beside its place, read from there, and compared with the model. Only a file
that agrees with the model is renamed to its name. The model is the one that `exnorm.load` returns: with the calibrated
statistics, if the checkpoint has them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from exnorm import ops
from exnorm.config.errors import UserError, first_line
from exnorm.engine import checkpoint
from exnorm.engine.description import describe
from exnorm.export.check import Agreement, CheckFailed, Sample, batches, compare, sample
from exnorm.export.exported import Exported, Loaded
from exnorm.export.programs import read_onnx, read_program, write_onnx, write_program
from exnorm.export.weights import read_hub_folder, read_safetensors, write_hub_folder, write_safetensors
from exnorm.runs.folder import RunFolder, check_out, names_file, rename_synced
from exnorm.tasks import make_task


@dataclass(frozen=True)
class Format:
    """A format of `exnorm export`.

    Attributes:
        name: of the file in the run's folder `export`.
        is_folder: it is a folder, not a file.
        packages: what it needs beyond exnorm's own dependencies.
    """

    name: str
    write: Callable[[Exported, Path], None]
    read: Callable[[Path], Loaded]
    is_folder: bool = False
    packages: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format("model.onnx", write_onnx, read_onnx, packages=("onnx", "onnxscript", "onnxruntime")),
    "torch_export": Format("model.pt2", write_program, read_program),
    "safetensors": Format("model.safetensors", write_safetensors, read_safetensors),
    "hf": Format("hf", write_hub_folder, read_hub_folder, is_folder=True),
}


def export(run_path: Path, form: str, *, at: str = "last", out: Path | None = None) -> str:
    """Write the model of a run and return a line about the file and its check.

    Args:
        form: onnx, torch_export, safetensors or hf.
        at: the checkpoint: last, best or a file.
        out: the file, or with hf the folder; None for one in the run's folder `export`.

    Raises:
        UserError: a package, a run or a checkpoint is missing, the file exists or cannot be written, or the format
            cannot hold this model.
        CheckFailed: what was written does not agree with the model. It is removed.
    """
    chosen = chosen_format(form)
    folder = RunFolder(run_path)
    target = new_target(folder, chosen.name, out, is_folder=chosen.is_folder)
    exported, images = trained(folder, at)
    return write_checked(exported, chosen, target, images, exported.model)


def chosen_format(form: str) -> Format:
    """Return a format.

    Raises:
        UserError: a package that it needs is missing.
    """
    needed = FORMATS[form].packages
    if not all(map(find_spec, needed)):
        *names, last = needed
        raise UserError(f"the format {form} needs {', '.join(names)} and {last}. Type pip install 'exnorm[export]'")
    return FORMATS[form]


def trained(folder: RunFolder, at: str) -> tuple[Exported, Sample]:
    """Return the model of a run's checkpoint, and images for its check."""
    config = checkpoint.read_config(folder)
    state = checkpoint.find(folder, at)
    model = checkpoint.build_trained(config, state).eval()
    images = sample(config, make_task(config.task, state["classes"]))
    noise = torch.randn(2, *images.images.shape[1:], generator=torch.Generator().manual_seed(0))
    return Exported(model, config, describe(folder, config, state), noise), images


def write_checked(exported: Exported, chosen: Format, target: Path, images: Sample, model: nn.Module) -> str:
    """Write a file, compare it with a model on images, rename it to its name, and return a line about it.

    Raises:
        UserError: the format cannot hold the model.
        CheckFailed: what was written does not agree with the model. It is removed.
    """
    target.parent.mkdir(exist_ok=True)
    with (
        ops.using_backend("eager"),  # compiling the layers would take longer than the export
        names_file(target),
        TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as temporary,
    ):
        part = Path(temporary) / chosen.name
        chosen.write(exported, part)
        size = sum(file.stat().st_size for file in (part.rglob("*") if chosen.is_folder else [part]))
        try:
            loaded = chosen.read(part)
            found = compare(loaded.run, model, batches(images.images, exported.smallest))
        except CheckFailed as problem:
            raise CheckFailed(f"{target} was not written: {problem}") from None
        except Exception as problem:
            raise CheckFailed(f"{target} was not written: it cannot be read back ({first_line(problem)})") from problem
        rename_synced(part, target)
    return f"{target}: {size / 1e6:.1f} MB{loaded.note}. {agreement(images, found)}"


def agreement(images: Sample, found: Agreement) -> str:
    """Return a sentence on how much two networks agree."""
    return (
        f"On {images.what} the logits differ by at most {found.difference:.1e} (largest logit: {found.logit:.3g}), and "
        f"{found.same_class:.2%} of the most likely classes are equal"
    )


def new_target(folder: RunFolder, name: str, out: Path | None, *, is_folder: bool) -> Path:
    """Return the place of an export: `out`, or a name in the run's folder `export`.

    Raises:
        UserError: it exists, or it cannot be written.
    """
    target = folder.path / "export" / name if out is None else out
    if target.exists():
        raise UserError(f"{target} exists. Remove it, or type --out PATH to write to another place")
    if out is not None and is_folder and not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    if out is not None and not is_folder:
        check_out(out, Path(name).suffix)
    return target

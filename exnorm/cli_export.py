"""The commands that write trained models for other programs. Each imports its modules when it runs."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What `exnorm export` writes."""

    onnx = "onnx"
    torch_export = "torch_export"
    safetensors = "safetensors"
    hf = "hf"


class Program(StrEnum):
    """What `exnorm fold` writes."""

    torch_export = "torch_export"
    onnx = "onnx"


def export(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", exists=True, file_okay=False)],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="ONNX, a program of torch.export, the weights, or a folder in timm's hub layout."
        ),
    ],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint: last, best or a file.")] = "last",
    out: Annotated[
        Path | None, typer.Option(show_default="in the run's folder export", help="File, or with hf folder, to write.")
    ] = None,
) -> None:
    """Write the model of a run for other programs, and compare the written file with the model on 64 images."""
    from exnorm.export.check import CheckFailed
    from exnorm.export.write import export as write

    try:
        print(write(run_dir, form.value, at=checkpoint, out=out))
    except CheckFailed as problem:
        print(f"exnorm: error: {problem}", file=sys.stderr)
        raise typer.Exit(1) from None


def fold(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", exists=True, file_okay=False)],
    form: Annotated[
        Program, typer.Option("--format", help="Format of the file: a program of torch.export, or ONNX.")
    ] = Program.torch_export,
    checkpoint: Annotated[str, typer.Option(help="Checkpoint: last, best or a file.")] = "last",
    out: Annotated[Path | None, typer.Option(show_default="in the run's folder export", help="File to write.")] = None,
) -> None:
    """Fold layers with a constant scale and shift into the convolutions of a run's model, and write it for inference.

    Prints which layers are folded and why others are not, the difference of the outputs, and the time of inference.
    """
    from exnorm.diagnostics.bench_fold import measure
    from exnorm.export.check import CheckFailed
    from exnorm.export.fold import fold_run, print_report, write_folded

    try:
        run = fold_run(run_dir, form.value, at=checkpoint, out=out)
        print_report(run)
        print(measure(run.before.model, run.after.model, run.images.images))
        print(write_folded(run))
    except CheckFailed as problem:
        print(f"exnorm: error: {problem}", file=sys.stderr)
        raise typer.Exit(1) from None

"""The command that writes trained models for other programs. It imports its modules when it runs."""

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

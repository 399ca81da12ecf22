"""The verbs of `exnorm bench`, which measure speed and memory; each imports its room when it runs."""

from typing import Annotated

import typer

bench = typer.Typer(help="Measure speed and memory; tables are appended to results/bench/.")


@bench.command("norms")
def bench_norms(
    norm: Annotated[list[str] | None, typer.Option(help="A normalizer; all without.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="As 16x64x112x112; six of ResNet-50's without.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="eager, compiled or triton [default: eager and compiled].")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Times each is run, in turn.")] = 11,
) -> None:
    """One layer with its ReLU, forward and backward, against torch's BN: time, ratio, bytes saved."""
    from exnorm.config.groups import group_options
    from exnorm.diagnostics import bench_norms as room

    room.run(norm or group_options("norm"), shape or room.SHAPES, backend or ["eager", "compiled"], rounds)


@bench.command("data")
def bench_data(
    overrides: Annotated[list[str] | None, typer.Argument(help="data=NAME data.root=DIR; imitations without.")] = None,
    images: Annotated[int, typer.Option(min=64, help="Images of each pass.")] = 512,
    rounds: Annotated[int, typer.Option(min=2, help="Passes of each, in turn.")] = 11,
) -> None:
    """The loader against a bare torchvision ImageFolder: images per second; and the index of 1.3 million files."""
    from exnorm.diagnostics.bench_data import run

    run(overrides or [], images, rounds)


@bench.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help="A timm model.")] = "resnet50",
    norm: Annotated[str, typer.Option(help="A normalizer.")] = "en",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 16,
    image_size: Annotated[int, typer.Option(min=8, help="Pixels.")] = 224,
    backend: Annotated[str, typer.Option(help="eager, compiled, triton or auto.")] = "compiled",
    rounds: Annotated[int, typer.Option(min=2, help="Steps of each, in turn.")] = 7,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
) -> None:
    """Training steps against the untouched timm model in the same process: images per second, ratio, memory."""
    from exnorm.diagnostics.bench_train import run

    run(model, norm, batch, image_size, backend, rounds, bf16)

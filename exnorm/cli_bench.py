"""The commands of `exnorm bench`, which measure speed and memory. Each imports its modules when it runs."""

from typing import Annotated

import typer

bench = typer.Typer(help="Measure speed and memory. Results are appended to the tables in results/bench/.")


@bench.command("norms")
def bench_norms(
    norm: Annotated[list[str] | None, typer.Option(show_default="all", help="Normalizer.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(show_default="six of ResNet-50", help="Shape of the input, such as 16x64x112x112."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(show_default="eager and compiled", help="Back end: eager, compiled or triton.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Number of rounds. In each, every layer runs once.")] = 11,
) -> None:
    """Measure one layer with its ReLU, forward and backward, against torch's BN: time and saved memory."""
    from exnorm.config.groups import group_options
    from exnorm.diagnostics.bench_norms import SHAPES, run

    run(norm or group_options("norm"), shape or SHAPES, backend or ["eager", "compiled"], rounds)


@bench.command("data")
def bench_data(
    overrides: Annotated[
        list[str] | None, typer.Argument(show_default="generated images", help="data=NAME data.root=DIR.")
    ] = None,
    images: Annotated[int, typer.Option(min=64, help="Number of images per pass.")] = 512,
    rounds: Annotated[int, typer.Option(min=2, help="Number of passes of each loader.")] = 11,
) -> None:
    """Measure the loader against torchvision's ImageFolder, and the index of 1.3 million files."""
    from exnorm.diagnostics.bench_data import run

    run(overrides or [], images, rounds)


@bench.command("train")
def bench_train(
    model: Annotated[str, typer.Option(help="Name of a timm model.")] = "resnet50",
    norm: Annotated[str, typer.Option(help="Normalizer.")] = "en",
    batch: Annotated[int, typer.Option(min=1, help="Number of images per step.")] = 16,
    image_size: Annotated[int, typer.Option(min=8, help="Height and width of the images in pixels.")] = 224,
    backend: Annotated[str, typer.Option(help="Back end: eager, compiled, triton or auto.")] = "compiled",
    rounds: Annotated[int, typer.Option(min=2, help="Number of steps of each model.")] = 7,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
) -> None:
    """Measure training steps against the unchanged timm model: images per second and memory."""
    from exnorm.diagnostics.bench_train import run

    run(model, norm, batch, image_size, backend, rounds, bf16)

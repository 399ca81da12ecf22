"""The commands that look into trained models. Each imports its modules when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from exnorm.config.errors import UserError


def ratios(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", exists=True, file_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data=NAME data.root=DIR: another data set to compare with, by class.")
    ] = None,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Measure EN's ratios for each class of validation images.")
    ] = False,
    wrong_labels: Annotated[
        bool,
        typer.Option("--wrong-labels", help="Measure how well EN's ratios of training images tell wrong labels."),
    ] = False,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="NAME", show_default="ten classes", help="Class to measure, several times for several."
        ),
    ] = None,
) -> None:
    """Print what each layer of a run mixes and the authors' advice. Write figures and a page into the run folder."""
    from exnorm.report.ratios import run, run_by_class, run_wrong_labels

    if wrong_labels and (by_class or overrides or classes):
        raise UserError("--wrong-labels measures the run's own training images. Leave the other options out")
    if wrong_labels:
        from exnorm.diagnostics.wrong_labels import measure_wrong_labels
        from exnorm.runs.folder import RunFolder

        run_wrong_labels(run_dir, measure_wrong_labels(RunFolder(run_dir)))
    elif by_class or overrides or classes:
        from exnorm.diagnostics.class_ratios import measured_sets

        run_by_class(run_dir, measured_sets(run_dir, overrides or [], classes or []))
    else:
        run(run_dir)


def predict(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", exists=True, file_okay=False)],
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER... [KEY=VALUE...]", help="Images and settings.")],
    out: Annotated[Path, typer.Option(help="Folder for the predictions.")] = Path("predictions"),
) -> None:
    """Write predictions for images: a table of the five most likely classes, or masks and overlays as PNG files.

    Settings are those of exnorm eval, such as checkpoint=best test.flip=true 'test.scales=[0.75,1,1.25]'.
    """
    from exnorm.diagnostics.predict import predict as write

    files, overrides = _split(inputs)
    count, failed = write(run_dir, files, out, overrides)
    print(f"{count} prediction{'' if count == 1 else 's'} in {out}")
    for line in failed:
        print(f"exnorm: warning: {line}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


def compare(
    words: Annotated[list[str], typer.Argument(metavar="RUN_DIR... [KEY=VALUE...]", help="Run folders and settings.")],
    images: Annotated[int, typer.Option(min=1, help="Number of validation images, evenly spaced over the set.")] = 6,
    out: Annotated[Path, typer.Option(help="File for the figure, PNG.")] = Path("compared.png"),
) -> None:
    """Draw validation images with their masks and the masks that runs of segmentation predict.

    Settings are those of exnorm eval, such as data.split=test checkpoint=best test.flip=true.
    """
    from exnorm.diagnostics.compare_masks import compare as draw
    from exnorm.runs.folder import check_out

    check_out(out, ".png")
    runs, overrides = _split(words)
    draw(runs, images, overrides).save(out, optimize=True)
    print(f"figure: {out}")


def _split(words: list[str]) -> tuple[list[Path], list[str]]:
    """Return the paths and the settings among words."""
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    return [Path(word) for word in words if word not in settings], settings


def explain(
    run_dir: Annotated[
        Path,
        typer.Argument(
            help="Run folder of a model with EN, SN or another norm that mixes.", exists=True, file_okay=False
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint: last, best or a file.")] = "last",
    out: Annotated[Path, typer.Option(help="File for the figure, PNG or SVG.")] = Path("explained.png"),
) -> None:
    """Draw, for single images, each layer's ratios beside the image and the prediction."""
    from exnorm.diagnostics.explain_images import explain_images
    from exnorm.report.image_figure import image_figure
    from exnorm.runs.folder import check_out

    check_out(out, ".png", ".svg")
    found = explain_images(run_dir, images, at=checkpoint)
    for item in found:
        print(f"{item.name}: " + ", ".join(f"{name} {share:.1%}" for name, share in item.guesses))
    image_figure(found, run_dir.name).savefig(out, dpi=150)
    print(f"figure: {out}")

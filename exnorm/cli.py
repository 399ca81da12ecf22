"""The command line. Each command imports its modules when it runs, so that --help is instant.

`exnorm train` passes its arguments to `hydra.main`. Sweeps (-m), --cfg job, --help and launchers are Hydra's own.
A user's mistake is printed as one line on stderr, with exit code 2. EXNORM_TRACEBACK=1 prints the traceback instead.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exnorm import cli_look
from exnorm.cli_bench import bench
from exnorm.cli_export import export, fold
from exnorm.config.errors import BUG, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

app = typer.Typer(
    name="exnorm",
    help="Learning to normalize: train, evaluate and compare normalization layers in any backbone.",
    epilog="A first run, with nothing to download: exnorm train model=resnet18 norm=en",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
TO_HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Kind(StrEnum):
    """What `exnorm list` lists."""

    norms = "norms"
    models = "models"
    data = "data"
    tasks = "tasks"
    studies = "studies"


class Item(StrEnum):
    """What `exnorm show` shows."""

    norm = "norm"
    model = "model"
    data = "data"
    task = "task"


class Format(StrEnum):
    """How `exnorm table` writes a table."""

    md = "md"
    tex = "tex"
    csv = "csv"
    html = "html"


def main() -> None:
    """Run the command line; the entry point of the package."""
    from exnorm.runs.output import outlive_output

    outlive_output()
    if os.environ.pop("EXNORM_END_WITH_PARENT", None):
        from exnorm.runs.subprocesses import end_with_parent

        end_with_parent()
    from exnorm.runs.output import print_anything

    print_anything()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="exnorm", standalone_mode=False))
    except typer.Abort:  # Ctrl-C
        sys.exit(130)
    except Exception as exc:
        if explained(exc):
            sys.exit(2)
        exc.add_note(BUG)
        raise


def explained(exc: Exception) -> bool:
    """Print a user's mistake as one line. Return False for any other exception, which keeps its traceback."""
    from exnorm.config.explain import explain, is_user_error

    if os.environ.get("EXNORM_TRACEBACK") or not is_user_error(exc):
        return False
    print(f"exnorm: error: {explain(exc)}", file=sys.stderr)
    return True


def print_version(wanted: bool) -> None:
    """Print the version and exit, if `wanted`."""
    if wanted:
        from exnorm import __version__

        print(f"exnorm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    config_dir: Annotated[
        Path | None, typer.Option(help="Folder with options of your own, such as norm/my.yaml; also EXNORM_CONF.")
    ] = None,
) -> None:
    """Learning to normalize: train, evaluate and compare normalization layers in any backbone."""
    if config_dir is not None:
        from exnorm.config.folders import add_folder

        add_folder(config_dir)


@app.command(context_settings=TO_HYDRA, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model, resume it, or print its result if it is finished."""
    from exnorm.config.words import is_sweep, without_submit
    from exnorm.engine.job import place_in_job

    words, to_cluster = without_submit(context.args)
    if to_cluster:
        from exnorm.studies.submit import submit_training

        submit_training(words, to_cluster)
        return
    place = place_in_job(words)
    if place is None:
        train_by_words(words)
        return
    from exnorm.engine.in_job import follow, leading

    if place.rank > 0:
        sys.exit(follow(place))
    with leading(place):
        if is_sweep(words):
            raise UserError("-m: the processes of a job train one run together. Start a job for each run")
        train_by_words(words)


def train_by_words(words: list[str]) -> None:
    """Pass the words of the command line to Hydra, which composes the configuration and calls `train_task`."""
    import hydra

    from exnorm.cli_sweep import SWEEP
    from exnorm.config.backbones import register_requested
    from exnorm.config.folders import conf_dir
    from exnorm.config.groups import register_schemas, search_words
    from exnorm.config.words import MULTIRUN, check_options, with_home

    check_options(words)
    words = [with_home(word) for word in words]
    register_schemas()
    register_requested(words)
    SWEEP.note_words(words)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors; main() prints them
    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(train_task)
    ordered = sorted(words, key=lambda word: word not in MULTIRUN)  # argparse wants flags first
    first = next((place for place, word in enumerate(ordered) if "=" in word and word[0] != "-"), len(ordered))
    ordered[first:first] = search_words()  # and all settings in one row
    arguments, sys.argv = sys.argv, ["exnorm train", *ordered]
    try:
        run()
    except Exception:
        if not SWEEP.failed:
            raise
        sys.exit(SWEEP.exit_code())
    finally:
        sys.argv = arguments


def train_task(config: "DictConfig") -> None:
    """Check the configuration and launch the run. A module-level function, because launchers pickle it.

    In a sweep an exception is printed and raised again, so that Hydra runs the other jobs.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from exnorm.cli_sweep import SWEEP
    from exnorm.config.compose import check_train
    from exnorm.engine.launch import run

    in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    SWEEP.started += in_sweep
    try:
        check_train(config)
        run(config)
    except Exception as exc:
        if in_sweep:
            SWEEP.note_failure(exc)
            raise
        if not explained(exc):
            raise
        sys.exit(2)


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", exists=True, file_okay=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, such as data.root=DIR.")] = None,
) -> None:
    """Evaluate a run: checkpoint=last|best|FILE, inference=moving_average|batch_average, data.root=DIR, ..."""
    from exnorm.engine.launch import evaluate_run

    evaluate_run(run_dir, overrides or [])


@app.command("list")
def list_group(
    kind: Annotated[Kind, typer.Argument(help="Which list to print.")],
    pattern: Annotated[
        str, typer.Option("--filter", metavar="PATTERN", help="Pattern of the names to print, such as 'resnet*'.")
    ] = "*",
) -> None:
    """List the norms, models or data sets that norm=, model= and data= take, or the studies of exnorm reproduce."""
    from exnorm.config.catalog import catalog

    rows = catalog("study" if kind is Kind.studies else kind.value.removesuffix("s"), pattern)
    width = max((len(name) for name, text in rows if text), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


@app.command()
def show(
    item: Annotated[Item, typer.Argument(help="The kind of NAME.")],
    name: Annotated[str, typer.Argument(help="A name that exnorm list prints.")],
) -> None:
    """Print the description and the options of a norm, or the options of a model or a data set."""
    from exnorm.config.catalog import card

    print(card(item.value, name))


@app.command()
def doctor(
    overrides: Annotated[list[str] | None, typer.Argument(help="data=NAME data.root=DIR ...")] = None,
    images: Annotated[int, typer.Option(min=0, help="Number of images of each split to open; 0 opens all.")] = 1000,
    sheet: Annotated[
        Path | None, typer.Option(show_default="NAME-sheet.png", help="File for the sheet of training images.")
    ] = None,
) -> None:
    """Check this installation and this machine; with data=NAME, check a data set."""
    if overrides:
        from exnorm.diagnostics.doctor_data import run as look

        raise typer.Exit(look(overrides, images, sheet))
    from exnorm.diagnostics.doctor import run

    raise typer.Exit(run())


@app.command()
def runs(root: Annotated[Path, typer.Argument(help="Folder with the runs.")] = Path("runs")) -> None:
    """List the runs in a folder, with their state and accuracy."""
    from exnorm.runs.listing import list_runs
    from exnorm.runs.table import print_runs

    print_runs(list_runs(root))


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="Name of a study, such as sn-table2, or a YAML file.")],
    scale: Annotated[
        str,
        typer.Option(help="Scale: mini (drawn images), small and gpu (CIFAR-10) or full (the paper's data)."),
    ] = "mini",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, show_default="the study's", help="Seeds per cell.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=VALUE", help="Cells to run, such as norm=en; seed=0 selects a seed."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the cells, the seeds and the hours left, and run nothing.")
    ] = False,
    skip_recorded: Annotated[
        bool,
        typer.Option("--skip-recorded", help="Leave out results that the records have, even without their runs."),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, show_default="one per core or GPU", help="Number of runs at the same time.")
    ] = None,
    submit: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Submit to a cluster with these submitit parameters.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run the commands on a Ray cluster.")] = False,
    gpus_per_run: Annotated[
        int | None, typer.Option(min=1, show_default="1, if the cluster has GPUs", help="GPUs of each run with --ray.")
    ] = None,
    images_per_s: Annotated[float | None, typer.Option(min=0.001, help="Speed of a GPU, for the plan.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("results"),
) -> None:
    """Run the missing cells of a study and write its record. The same command again resumes."""
    from exnorm.config.study import chosen_cells, load_study
    from exnorm.report.verdicts import check
    from exnorm.studies.plan import jobs_of
    from exnorm.studies.recorded import left_of_all
    from exnorm.studies.reproduce import print_plan, reproduce

    if ray and submit:
        raise UserError("--ray and --submit are two ways to other machines. Use one of them")
    if gpus_per_run is not None and not ray:
        raise UserError("--gpus-per-run is for --ray. Add --ray, or leave it out")
    wanted = load_study(study, scale, seeds=seeds)
    check(wanted)
    found = jobs_of(wanted, chosen_cells(wanted, only or []), runs)
    if skip_recorded:
        found = left_of_all(wanted, found, results, copy=not plan)
    if plan:
        print_plan(wanted, found, results, images_per_s=images_per_s)
    elif submit:
        from exnorm.studies.submit import submit as submit_jobs

        submit_jobs(wanted, found, runs, results, submit)
    elif ray:
        from exnorm.studies.on_ray import reproduce_on_ray

        raise typer.Exit(reproduce_on_ray(wanted, found, runs, results, at_once=jobs, gpus=gpus_per_run))
    else:
        raise typer.Exit(reproduce(wanted, found, results, at_once=jobs))


@app.command()
def table(
    study: Annotated[str, typer.Argument(help="Name of a study, such as sn-table2, or a YAML file.")],
    scale: Annotated[str, typer.Option(help="Scale: mini, small, gpu or full.")] = "mini",
    form: Annotated[Format, typer.Option("--format", help="Output format.")] = Format.md,
    results: Annotated[Path, typer.Option(help="Folder with the records.")] = Path("results"),
) -> None:
    """Print the table of a study from its record: mean ± deviation (seeds), published value, difference."""
    from exnorm.config.study import load_study
    from exnorm.report.study_table import FORMATS, table_of

    print(FORMATS[form.value](table_of(load_study(study, scale), results)), end="")


@app.command()
def claims(
    studies: Annotated[list[str] | None, typer.Argument(show_default="all", help="Names of studies.")] = None,
    scale: Annotated[str, typer.Option(help="Scale: mini, small, gpu or full.")] = "mini",
    results: Annotated[Path, typer.Option(help="Folder with the records.")] = Path("results"),
) -> None:
    """Print a verdict on each claim of the papers: supported, contradicted or undecided."""
    from exnorm.report.claims_table import judged_studies, print_verdicts

    print_verdicts(judged_studies(studies or [], scale, results))


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(help="Folder that contains records/.")] = Path("results"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing. Exit with 1 if a file is out of date.")
    ] = False,
) -> None:
    """Write all tables, verdicts and figures, and results/README.md, from the records."""
    from exnorm.report.results import differences, own_records, write_results

    if check:
        from exnorm.studies.collect import stale_rows

        lines = [*stale_rows(folder), *differences(folder)]
        print("\n".join(lines) or f"{folder}: every file agrees with the records")
        raise typer.Exit(1 if lines else 0)
    for path in write_results(folder):
        print(path)
    for name in own_records(folder):
        print(f"{name}.csv is left out: it is the record of your own study. Type exnorm table FILE.yaml to see it")


@app.command()
def report(
    what: Annotated[str, typer.Argument(help="Name of a study, such as sn-table2, or a run folder.")],
    scale: Annotated[str, typer.Option(help="Scale of the study: mini, small, gpu or full.")] = "mini",
    out: Annotated[
        Path | None,
        typer.Option(show_default="STUDY-SCALE.html, or report.html in the run folder", help="File to write."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder with the study's runs.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Folder with the records.")] = Path("results"),
) -> None:
    """Write a report as one HTML file: table, verdicts, figures, ratios of layers, and the runs behind every number."""
    from exnorm.report.html_report import write_report

    print(write_report(what, scale, out, runs=runs, results=results))


for command in (cli_look.ratios, cli_look.predict, cli_look.compare, cli_look.explain, export, fold):
    app.command()(command)

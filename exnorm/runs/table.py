"""Tables on the terminal, and the list of runs as one."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exnorm.runs.listing import RunSummary

HEADERS = ("run", "state", "epoch", "metric", "value", "data", "model", "norm", "batch", "seed", "started", "reason")


def print_runs(runs: Sequence[RunSummary]) -> None:
    """Print one line per run."""
    table = Table(*HEADERS, box=None, pad_edge=False)
    for run in runs:
        table.add_row(*row(run))
    if runs:
        print_table(table)
    else:
        Console().print("There are no runs yet. Type exnorm train")


def print_table(table: Table) -> None:
    """Print a table; away from a terminal it is as wide as its content."""
    console = Console()
    if not console.is_terminal:
        console = Console(
            width=max(80, table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum)
        )
    console.print(table)


def row(run: RunSummary) -> list[str]:
    """Return a run's cells; what is not known is empty."""
    epoch = "" if run.epoch is None else f"{run.epoch}/{run.epochs}" if run.epochs else str(run.epoch)
    value = "" if run.value is None else f"{run.value:.2f}"
    seed = "" if run.seed is None else str(run.seed)
    known = [run.path.name, run.state, epoch, run.metric, value, run.data, run.model, run.norm, run.batch, seed]
    return [*known, run.started, escape(run.reason)]

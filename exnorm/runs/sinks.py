"""Copies of the metrics for other eyes: a CSV file, Weights & Biases. Losing one never stops a run."""

import csv
import io
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from exnorm.runs.children import stop_signals_blocked
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.metrics import append_text, drop_torn_line, is_known, plain


class Sink(Protocol):
    """Takes rows of metrics; `step` counts optimizer steps and never falls."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Take a table; a later one of the same name replaces it."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Finish, or with an exit code stop early; nothing is logged after it."""
        ...


class CsvSink:
    """One line per row, one column per metric. A new metric rewrites the file with one more column."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        if self.path.is_file():
            drop_torn_line(self.path)
            self.columns = list(self._read()[0])

    def log(self, row: dict[str, Any], step: int) -> None:
        """Append a row; NaN and infinity become empty cells."""
        full = {"step": step, **row}
        new = [key for key in full if key not in self.columns]
        if new:
            columns, rows = [*self.columns, *new], self._read()[1]
            write_text_atomic(self.path, csv_text([columns, *(cells(old, columns) for old in rows)]))
            self.columns = columns
        append_text(self.path, csv_text([cells(full, self.columns)]))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write `tables/<name>.csv` with the step as its first column."""
        path = self.path.parent / "tables" / f"{name.replace('/', '_')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, csv_text([["step", *columns], *([step, *map(plain, row)] for row in rows)]))

    def close(self, exit_code: int = 0) -> None:
        """Every row is on disk already."""

    def cut_back(self, step: int, epochs: int) -> None:
        """Keep the rows that a checkpoint knows of, as `MetricsLog.cut_back` does."""
        rows = [row for row in self._read()[1] if is_known(row, step, epochs)]
        if self.columns:
            write_text_atomic(self.path, csv_text([self.columns, *(cells(row, self.columns) for row in rows)]))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.is_file():
            return [], []
        with open(self.path, encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            return list(reader.fieldnames or []), rows


def cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """Return a row's values in the order of the columns; csv writes None as an empty cell."""
    return [plain(row.get(key)) for key in columns]


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as lines of CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


class WandbSink:
    """A W&B run whose files lie in the run folder; online only on request and with a key.

    Whatever W&B raises becomes one warning, and the sink is off from then on: the run goes on. Each resumption is a
    new offline file with the same id, which `wandb sync` puts together in order.
    """

    def __init__(self, folder: RunFolder, *, mode: str, project: str, config: dict[str, Any]) -> None:
        self.run: Any = None
        self.last_step = 0
        self._guard("start", lambda: self._start(folder, mode, project, config))

    def log(self, row: dict[str, Any], step: int) -> None:
        """Log a row at a step; W&B would drop a step that falls, so it is held at the last one."""
        self.last_step = max(step, self.last_step)
        self._use("log", lambda run: run.log({**row, "step": step}, step=self.last_step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a W&B table."""
        self.last_step = max(step, self.last_step)

        def send(run: Any) -> None:
            import wandb

            data: list[Any] = [[plain(item) for item in row] for row in rows]
            run.log({name: wandb.Table(columns=list(columns), data=data)}, step=self.last_step)

        self._use("log a table", send)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; with an exit code leave it to be resumed."""
        if not exit_code:
            self._use("finish", lambda run: run.finish())
        self.run = None
        with suppress(Exception):  # its service may be gone, and its own hook at exit would print a traceback then
            import wandb

            wandb.teardown(exit_code)

    def _start(self, folder: RunFolder, mode: str, project: str, config: dict[str, Any]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            warn("W&B has no key, so this run is logged offline; wandb login stores one")
            mode = "offline"
        folder.wandb_dir.mkdir(parents=True, exist_ok=True)
        with stop_signals_blocked():  # its service outlives a warning to the whole job, and ends with this process
            self.run = wandb.init(
                project=project,
                id=wandb_id(folder),
                name=folder.path.name,
                dir=str(folder.path),  # W&B makes the folder wandb/ in it
                config=config,
                mode="online" if mode == "online" else "offline",
                resume="allow",
                settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_machine_info=True),
            )
        self.last_step = self.run.starting_step
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _use(self, what: str, action: Callable[[Any], None]) -> None:
        if self.run is not None:
            self._guard(what, lambda: action(self.run))

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as problem:  # noqa: BLE001 - by contract: W&B never stops a run
            self.run = None
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            warn(f"W&B could not {what} ({reason}); the run goes on without it")


def wandb_id(folder: RunFolder) -> str:
    """Return the id under which W&B knows a run: drawn once, and gone with the folder."""
    if not folder.wandb_id_file.is_file():
        write_text_atomic(folder.wandb_id_file, secrets.token_hex(8))
    return folder.wandb_id_file.read_text(encoding="utf-8")


def warn(text: str) -> None:
    """Print one line of warning."""
    print(f"exnorm: warning: {text}", file=sys.stderr, flush=True)


def make_sinks(
    folder: RunFolder,
    logger_config: Mapping[str, Any],
    *,
    step: int = 0,
    epochs: int = 0,
    run_config: dict[str, Any] | None = None,
) -> list[Sink]:
    """Return the sinks that `logger` asks for; the CSV is cut back to `step` steps and `epochs` validated epochs.

    `run_config` is what W&B shows as the run's configuration. Raise ValueError for an unknown `logger.wandb`.
    """
    mode = logger_config["wandb"]
    if mode not in ("off", "offline", "online"):
        raise ValueError(f"logger.wandb={mode} is unknown: type off, offline or online")
    sinks: list[Sink] = []
    if logger_config["csv"]:
        sink = CsvSink(folder.csv_file)
        sink.cut_back(step, epochs)
        sinks.append(sink)
    if mode != "off":
        sinks.append(WandbSink(folder, mode=mode, project=logger_config["project"], config=run_config or {}))
    return sinks

"""Copies of the metrics for other programs: a CSV file, Weights & Biases, and what else `logger` names.

If a copy fails, the run continues: `Sinks` guards all of them. A sink only does its work and may raise any Exception.
"""

import copy
import csv
import io
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from exnorm.config.errors import UserError, first_line
from exnorm.config.options import imported_class
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.metrics import MetricsLog, append_text, plain
from exnorm.runs.subprocesses import stop_signals_blocked
from exnorm.runs.wandb_service import LEAVE_S, LIMIT_S, answers_within


@runtime_checkable
class Sink(Protocol):
    """Takes rows of metrics; `step` counts optimizer steps and never falls.

    A class of `logger.sinks` is called with the run folder, the run's configuration and its own options:

        MySink(folder: RunFolder, run_config: dict[str, Any], **options)

    This happens at each start of a run, after the rows of `metrics.jsonl` were cut back to the last checkpoint. So
    `MetricsLog.read(folder.metrics_file)` returns the rows that count. An earlier sink of the run may have seen more.
    """

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Take a table; a later one of the same name replaces it."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Finish; nothing is logged after.

        Args:
            exit_code: 0 if the run is complete. Otherwise the run stopped early or failed, or this sink failed.
        """
        ...


class CsvSink:
    """One line per row of `metrics.jsonl`, one column per metric.

    The file is never read, because a spreadsheet may have saved it with other separators. It is rewritten from
    `metrics.jsonl` at each start and for each new metric.

    Args:
        truth: `metrics.jsonl`, to which each row is written first.
    """

    def __init__(self, path: Path | str, *, truth: Path) -> None:
        self.path, self.truth = Path(path), truth
        self.columns: list[str] = []
        self._write_anew()

    def log(self, row: dict[str, Any], step: int) -> None:
        """Append a row; NaN and infinity become empty cells."""
        full = {"step": step, **row}
        if all(key in self.columns for key in full):
            append_text(self.path, csv_text([cells(full, self.columns)]))
        else:
            self._write_anew()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write `tables/<name>.csv` with the step as its first column."""
        path = self.path.parent / "tables" / f"{name.replace('/', '_')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, csv_text([["step", *columns], *([step, *map(plain, row)] for row in rows)]))

    def close(self, exit_code: int = 0) -> None:
        """Do nothing: every row is already on disk."""

    def _write_anew(self) -> None:
        rows = MetricsLog.read(self.truth)
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows or self.path.exists():
            lines = [self.columns] if rows else []
            write_text_atomic(self.path, csv_text([*lines, *(cells(row, self.columns) for row in rows)]))


def cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """Return a row's values in the order of the columns; csv writes None as an empty cell."""
    return [plain(row.get(key)) for key in columns]


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as lines of CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


class WandbSink:
    """A W&B run with its files in the run folder; online only on request and with a key.

    Each resumption writes a new offline file with the same id; `wandb sync` joins them in order.
    """

    def __init__(self, folder: RunFolder, *, mode: str, project: str, config: dict[str, Any]) -> None:
        self.limit_s = LIMIT_S[mode]
        try:
            with answers_within(self.limit_s):
                self.run = self._start(folder, mode, project, config)
                self.last_step: int = self.run.starting_step
        except Exception:
            self.close(1)
            raise

    def log(self, row: dict[str, Any], step: int) -> None:
        """Log a row at a step. W&B drops rows with a smaller step than before, so the step never decreases."""
        self.last_step = max(step, self.last_step)
        with answers_within(self.limit_s):
            self.run.log({**row, "step": step}, step=self.last_step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a W&B table."""
        import wandb

        self.last_step = max(step, self.last_step)
        data: list[Any] = [[plain(item) for item in row] for row in rows]
        with answers_within(self.limit_s):
            self.run.log({name: wandb.Table(columns=list(columns), data=data)}, step=self.last_step)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; with an exit code, leave it open for resuming."""
        with answers_within(self.limit_s):
            if not exit_code:
                self.run.finish()
        limit_s = LEAVE_S if exit_code else self.limit_s  # the error that ends the run is printed afterwards
        with suppress(Exception), answers_within(limit_s):  # its service may be gone
            import wandb

            wandb.teardown(exit_code)  # else its exit hook prints a traceback

    def _start(self, folder: RunFolder, mode: str, project: str, config: dict[str, Any]) -> Any:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            warn("W&B has no key, so this run is logged offline. To store a key, type wandb login")
            mode = "offline"
        folder.wandb_dir.mkdir(parents=True, exist_ok=True)
        with stop_signals_blocked():  # W&B's service survives a signal to the complete job, and ends with this process
            run = wandb.init(
                project=project,
                id=wandb_id(folder),
                name=folder.path.name,
                dir=str(folder.path),  # W&B makes the folder wandb/ in it
                config=config,
                mode="online" if mode == "online" else "offline",
                resume="allow",
                settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_machine_info=True),
            )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def wandb_id(folder: RunFolder) -> str:
    """Return the W&B id of a run: random, and stored in the run folder."""
    if not folder.wandb_id_file.is_file():
        write_text_atomic(folder.wandb_id_file, secrets.token_hex(8))
    return folder.wandb_id_file.read_text(encoding="utf-8")


def warn(text: str) -> None:
    """Print one line of warning."""
    print(f"exnorm: warning: {text}", file=sys.stderr, flush=True)


class Sinks:
    """All sinks of a run. One that fails prints one warning and is off from then on; the run and the others continue.

    At the end of a `with`, all are closed: with exit code 0, or that of `Stopped`, or 1 after any other error.

    Args:
        starts: functions that make the sinks, by the names for warnings.
    """

    def __init__(self, starts: Mapping[str, Callable[[], Sink]]) -> None:
        self._running: dict[str, Sink] = {}
        self._failed: list[Sink] = []
        for name, start in starts.items():
            self._guard(name, "start", partial(self._start, name, start))

    def log(self, row: dict[str, Any], step: int) -> None:
        """Pass a row on; see `Sink.log`."""
        self._each("log", lambda sink: sink.log(dict(row), step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Pass a table on; see `Sink.table`."""
        self._each("log a table", lambda sink: sink.table(name, columns, rows, step))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0 if exc is None else getattr(exc, "exit_code", None) or 1)

    def close(self, exit_code: int = 0) -> None:
        """Close all sinks, at last those that failed; see `Sink.close`."""
        self._each("finish", lambda sink: sink.close(exit_code))
        for sink in self._failed:
            with suppress(Exception):  # its warning is printed
                sink.close(exit_code or 1)

    def _start(self, name: str, start: Callable[[], Sink]) -> None:
        self._running[name] = start()

    def _each(self, what: str, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._running.items()):
            self._guard(name, what, partial(act, sink))

    def _guard(self, name: str, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except (Exception, SystemExit) as problem:  # noqa: BLE001 - by contract: no sink stops a run
            if name in self._running:
                self._failed.append(self._running.pop(name))
            then = "" if what == "finish" else ". The run continues without it"
            warn(f"{name} could not {what} ({reason_of(problem)}){then}")


def reason_of(problem: BaseException) -> str:
    """Return one line for an exception, with the file of a system error."""
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename} cannot be written: {problem.strerror}"
    return first_line(problem)


def make_sinks(
    folder: RunFolder,
    logger_config: Mapping[str, Any],
    *,
    run_config: dict[str, Any] | None = None,
) -> Sinks:
    """Start the sinks that `logger` asks for; the CSV begins with the rows that `metrics.jsonl` has.

    W&B and other sinks get `run_config` as the run's configuration. Raise UserError for an unknown `logger.wandb`.
    """
    mode, config = logger_config["wandb"], run_config or {}
    if mode not in ("off", "offline", "online"):
        raise UserError(f"logger.wandb={mode} is unknown: type off, offline or online")
    starts: dict[str, Callable[[], Sink]] = {}
    if logger_config["csv"]:
        starts["CSV"] = partial(CsvSink, folder.csv_file, truth=folder.metrics_file)
    if mode != "off":
        starts["W&B"] = partial(WandbSink, folder, mode=mode, project=logger_config["project"], config=config)
    for name, values in logger_config["sinks"].items():
        starts[f"logger {name}"] = partial(start_sink, name, values, folder, copy.deepcopy(config))
    return Sinks(starts)


def check_classes(sinks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a class of `logger.sinks` cannot be imported, is no sink, or does not take its options."""
    for name, values in sinks.items():
        cls, options = class_and_options(name, values)
        if not issubclass(cls, Sink):
            raise UserError(
                f"logger.sinks.{name}: {cls.__name__} is no sink. It needs the methods log, table and close"
            )
        try:
            signature(cls).bind(None, None, **options)
        except TypeError as problem:
            raise UserError(f"logger.sinks.{name}: {cls.__name__}(folder, run_config, ...): {problem}") from None


def start_sink(name: str, values: Mapping[str, Any], folder: RunFolder, run_config: dict[str, Any]) -> Sink:
    """Return the sink that an entry of `logger.sinks` describes."""
    cls, options = class_and_options(name, values)
    return cls(folder, run_config, **options)


def class_and_options(name: str, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split an entry of `logger.sinks` into its class and the options for the class's constructor."""
    options = {str(key): value for key, value in values.items()}
    return imported_class(f"logger.sinks.{name}", options.pop("_target_")), options

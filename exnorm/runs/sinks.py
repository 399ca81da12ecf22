"""Copies of the metrics for other programs: a CSV file, Weights & Biases. If a copy fails, the run continues."""

import csv
import io
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from exnorm.config.errors import UserError
from exnorm.runs.folder import RunFolder, write_text_atomic
from exnorm.runs.metrics import MetricsLog, append_text, plain
from exnorm.runs.subprocesses import stop_signals_blocked


class Sink(Protocol):
    """Takes rows of metrics; `step` counts optimizer steps and never falls."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take one row."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Take a table; a later one of the same name replaces it."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Finish; an exit code means that the run stopped early. Nothing is logged afterwards."""
        ...


class CsvSink:
    """One line per row of `metrics.jsonl`, one column per metric.

    The file is never read, because a spreadsheet may have saved it with other separators. It is rewritten from
    `metrics.jsonl` at each start and for each new metric. If it cannot be written, one warning is printed and the run
    continues.

    Args:
        truth: `metrics.jsonl`, to which each row is written first.
    """

    def __init__(self, path: Path | str, *, truth: Path) -> None:
        self.path, self.truth = Path(path), truth
        self.columns: list[str] = []
        self.lost = False
        self._guard(self._write_anew)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Append a row; NaN and infinity become empty cells."""
        full = {"step": step, **row}
        if all(key in self.columns for key in full):
            self._guard(lambda: append_text(self.path, csv_text([cells(full, self.columns)])))
        else:
            self._guard(self._write_anew)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write `tables/<name>.csv` with the step as its first column."""
        path = self.path.parent / "tables" / f"{name.replace('/', '_')}.csv"
        text = csv_text([["step", *columns], *([step, *map(plain, row)] for row in rows)])

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, text)

        self._guard(write)

    def close(self, exit_code: int = 0) -> None:
        """Do nothing: every row is already on disk."""

    def _write_anew(self) -> None:
        rows = MetricsLog.read(self.truth)
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows or self.path.exists():
            lines = [self.columns] if rows else []
            write_text_atomic(self.path, csv_text([*lines, *(cells(row, self.columns) for row in rows)]))

    def _guard(self, write: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            write()
        except OSError as problem:
            self.lost = True
            warn(f"{self.path} cannot be written ({problem.strerror}). metrics.jsonl has all metrics")


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

    Any error of W&B becomes one warning. The sink is then off, and the run continues. Each resumption writes a new
    offline file with the same id; `wandb sync` joins them in order.
    """

    def __init__(self, folder: RunFolder, *, mode: str, project: str, config: dict[str, Any]) -> None:
        self.run: Any = None
        self.last_step = 0
        self._guard("start", lambda: self._start(folder, mode, project, config))

    def log(self, row: dict[str, Any], step: int) -> None:
        """Log a row at a step. W&B drops rows with a smaller step than before, so the step never decreases."""
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
        """Finish the W&B run; with an exit code, leave it open for resuming."""
        if not exit_code:
            self._use("finish", lambda run: run.finish())
        self.run = None
        with suppress(Exception):  # W&B's service may be gone; its exit hook would then print a traceback
            import wandb

            wandb.teardown(exit_code)

    def _start(self, folder: RunFolder, mode: str, project: str, config: dict[str, Any]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            warn("W&B has no key, so this run is logged offline. To store a key, type wandb login")
            mode = "offline"
        folder.wandb_dir.mkdir(parents=True, exist_ok=True)
        with stop_signals_blocked():  # W&B's service survives a signal to the complete job, and ends with this process
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
            warn(f"W&B could not {what} ({reason}). The run continues without it")


def wandb_id(folder: RunFolder) -> str:
    """Return the W&B id of a run: random, and stored in the run folder."""
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
    run_config: dict[str, Any] | None = None,
) -> list[Sink]:
    """Return the sinks that `logger` asks for; the CSV begins with the rows that `metrics.jsonl` has.

    W&B shows `run_config` as the run's configuration. Raise UserError for an unknown `logger.wandb`.
    """
    mode = logger_config["wandb"]
    if mode not in ("off", "offline", "online"):
        raise UserError(f"logger.wandb={mode} is unknown: type off, offline or online")
    sinks: list[Sink] = []
    if logger_config["csv"]:
        sinks.append(CsvSink(folder.csv_file, truth=folder.metrics_file))
    if mode != "off":
        sinks.append(WandbSink(folder, mode=mode, project=logger_config["project"], config=run_config or {}))
    return sinks

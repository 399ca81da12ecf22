"""The output of a run: a progress bar or a line per minute, a line per epoch, and the lines of `log.txt`."""

import math
import os
import sys
import time
from pathlib import Path

from torch import Tensor

from exnorm.engine.schedule import Schedule
from exnorm.runs.metrics import append_text
from exnorm.tasks import Task

BAR_EVERY_S = 0.5
LINE_EVERY_S = 60  # if stderr is a file or a pipe


class Progress:
    """Prints the progress of a run in one worker; the others print nothing."""

    def __init__(self, log_file: Path, task: Task, schedule: Schedule, *, active: bool) -> None:
        self.log_file, self.task, self.schedule, self.active = log_file, task, schedule, active
        self.on_terminal = active and sys.stderr.isatty()
        self.last_shown = time.monotonic()
        self.first: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        """Print lines and keep them in the log."""
        if self.active:
            self._clear()
            print(text, flush=True)
            append_text(self.log_file, text + "\n")

    def step(self, step: int, epoch: int, batch_sums: Tensor) -> None:
        """Move the bar, at most twice a second; without a terminal, a line on stderr at most once a minute."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        if not self.active or now - self.last_shown < (BAR_EVERY_S if self.on_terminal else LINE_EVERY_S):
            return
        self.last_shown = now
        done, since = self.first
        rate = (step - done) / (now - since) if now > since else 0.0
        steps = self.schedule.steps
        left = f", {duration((steps - step) / rate)} left" if rate else ""
        loss = self.task.summarize(batch_sums)["loss"]
        line = f"{self._part(epoch)}, step {step}/{steps}: train loss {loss:.3f}{left}"
        if self.on_terminal:
            filled = 24 * step // steps
            columns = _terminal_width() - 1  # a wrapped line could not be erased completely
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] "
            shown = (bar + line if len(bar + line) <= columns else line)[:columns]
            print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def epoch(self, epoch: int, row: dict[str, float], ratios: dict[str, float]) -> None:
        """Print one line with an epoch's metrics and mean ratios."""
        shares = " / ".join(f"{name} {share:.2f}" for name, share in ratios.items())
        primary, *others = [metric for metric in self.task.metrics if metric.name != "loss"]
        measured = "".join(f", {metric.label} {row[metric.key]:.{metric.digits}f}" for metric in (primary, *others))
        trained = row.get(f"train/{primary.name}")  # a metric that needs all samples is measured in validation only
        in_training = "" if trained is None else f", {primary.label} {trained:.1f}"
        self.say(
            f"{self._part(epoch)}: train loss {row['train/loss']:.3f}{in_training}; "
            f"val loss {row['val/loss']:.3f}{measured}"
            + "".join(
                f"; {name} {primary.label} {value:.{primary.digits}f}"
                for name, value in _each_set(row, primary.name).items()
            )
            + (f"; ratios {shares}" if shares else "")
        )

    def _part(self, part: int) -> str:
        return f"{self.schedule.unit} {part + 1}/{self.schedule.parts}"

    def _clear(self) -> None:
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _terminal_width() -> int:
    """Return the number of columns; 80 where the terminal does not know it or was closed meanwhile."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _each_set(row: dict[str, float], metric: str) -> dict[str, float]:
    """Return a metric of each of several validation sets: `val/<set>/<metric>`."""
    parts = {key: key.split("/") for key in row}
    return {words[1]: row[key] for key, words in parts.items() if len(words) == 3 and words[2] == metric}


def duration(seconds: float) -> str:
    """Return seconds as `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

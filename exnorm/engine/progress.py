"""The output of a run: a progress bar or a line per minute, a line per epoch, and the lines of `log.txt`."""

import math
import os
import sys
import time
from pathlib import Path

from torch import Tensor

from exnorm.runs.metrics import append_text

BAR_EVERY_S = 0.5
LINE_EVERY_S = 60  # if stderr is a file or a pipe


class Progress:
    """Prints the progress of a run in one worker; the others print nothing."""

    def __init__(self, log_file: Path, *, steps: int, epochs: int, active: bool) -> None:
        self.log_file, self.steps, self.epochs, self.active = (
            log_file,
            steps,
            epochs,
            active,
        )
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
        left = f", {duration((self.steps - step) / rate)} left" if rate else ""
        loss, _, _, count, *_ = batch_sums.tolist()
        line = f"epoch {epoch + 1}/{self.epochs}, step {step}/{self.steps}: train loss {loss / count:.3f}{left}"
        if self.on_terminal:
            filled = 24 * step // self.steps
            # A wrapped line could not be erased completely. A terminal of unknown width says 0.
            columns = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] "
            shown = (bar + line if len(bar + line) <= columns else line)[:columns]
            print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def epoch(self, epoch: int, row: dict[str, float], ratios: dict[str, float]) -> None:
        """Print one line with an epoch's metrics and mean ratios."""
        shares = " / ".join(f"{name} {share:.2f}" for name, share in ratios.items())
        self.say(
            f"epoch {epoch + 1}/{self.epochs}: train loss {row['train/loss']:.3f}, top-1 {row['train/top1']:.1f}; "
            f"val loss {row['val/loss']:.3f}, top-1 {row['val/top1']:.2f}, top-5 {row['val/top5']:.2f}"
            + "".join(f"; {name} top-1 {top1:.2f}" for name, top1 in _each_set(row).items())
            + (f"; ratios {shares}" if shares else "")
        )

    def _clear(self) -> None:
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _each_set(row: dict[str, float]) -> dict[str, float]:
    """Return the top-1 of each of several validation sets: `val/<set>/top1`."""
    parts = {key: key.split("/") for key in row}
    return {words[1]: row[key] for key, words in parts.items() if len(words) == 3 and words[2] == "top1"}


def duration(seconds: float) -> str:
    """Return seconds as `45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""What asks a training to stop with a checkpoint: a signal, or the end of `trainer.max_hours`. Imports no torch."""

import os
import signal
import time
from types import FrameType

from exnorm.runs.subprocesses import heeded_signals, say_in_handler

TIME_UP = 1000  # in place of the number of a signal
EXIT_TIME_UP = 75  # sysexits.h: try again. The same command continues
EXIT_KILLED = 128 + signal.SIGKILL


class Stopped(Exception):
    """A run ended early, after a checkpoint, because of a signal or because its time is up."""

    def __init__(self, reason: int) -> None:
        super().__init__(reason)
        self.exit_code = EXIT_TIME_UP if reason == TIME_UP else 128 + reason


class StopRequests:
    """The requests that reach this process. The training reads them between steps, by a call.

    Args:
        leads: this process has no controller: it prints that it saves a checkpoint, and a second Ctrl-C ends it.
    """

    def __init__(self, *, leads: bool = False) -> None:
        self._leads = leads
        self._received: list[int] = []
        self._end: float | None = None
        self._began = time.monotonic()
        self._last: float | None = None  # the time of the last call
        self._longest = 0.0

    def listen(self) -> None:
        """From now on, note signals instead of ending."""
        for signum in heeded_signals():
            signal.signal(signum, self._note)

    def limit(self, max_hours: float | None) -> None:
        """Ask for an end before so many hours since the start of this process are over."""
        self._end = None if max_hours is None else self._began + 3600 * max_hours

    def __call__(self) -> int:
        """Return the number of the first signal, TIME_UP, or 0. The time is up if the next call may come too late."""
        now = time.monotonic()
        self._longest = max(self._longest, 0.0 if self._last is None else now - self._last)
        self._last = now
        if self._received:
            return self._received[0]
        return TIME_UP if self._end is not None and now + self._longest > self._end else 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)
        if not self._leads:
            return
        if self._received.count(signal.SIGINT) > 1:
            os._exit(EXIT_KILLED)
        if len(self._received) == 1:
            say_in_handler(f"{signal.Signals(signum).name}: saving a checkpoint")

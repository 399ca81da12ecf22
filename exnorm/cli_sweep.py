"""Jobs of a sweep that fail: each has its line at once, and at the end it is said how many failed and which.

Hydra goes on with the other jobs and raises the first exception after the last one. Launchers that run jobs in
processes of their own show the line there.
"""

import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from exnorm.config.errors import BUG
from exnorm.config.explain import explain, is_user_error

EXIT_BUG, EXIT_USER_ERROR = 1, 2


class Sweep:
    """The jobs of a sweep that this process has run."""

    def __init__(self) -> None:
        self.started = 0
        self.failed: list[str] = []
        self.bugs = 0
        self.swept: set[str] = set()  # the keys with several values; a job is named by its values of them

    def note_words(self, words: Iterable[str]) -> None:
        """Learn from the words of the command line which keys have several values."""
        parser = OverridesParser.create()
        for word in words:
            with suppress(HydraException):  # a flag, or what Hydra will refuse
                if parser.parse_override(word).is_sweep_override():
                    self.swept.add(word.partition("=")[0])

    def note_failure(self, exc: Exception) -> None:
        """Print why the job that just ended failed: a line, or the traceback of a bug."""
        job = HydraConfig.get().job
        words = list(HydraConfig.get().overrides.task)
        name = " ".join([word for word in words if word.partition("=")[0] in self.swept] or words)
        self.failed.append(name)
        if is_user_error(exc) and not os.environ.get("EXNORM_TRACEBACK"):
            reason = explain(exc)
        else:
            self.bugs += 1
            traceback.print_exception(exc)
            reason = BUG.removeprefix("exnorm: ")
        print(f"exnorm: error: {reason} (job {job.num}: {name})", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        """Say which jobs failed, and return the exit code."""
        which = "; ".join(self.failed)
        print(f"exnorm: {len(self.failed)} of {self.started} jobs failed: {which}", file=sys.stderr, flush=True)
        return EXIT_BUG if self.bugs else EXIT_USER_ERROR


SWEEP = Sweep()

"""Failed jobs of a sweep. Each prints one line at once; at the end the sweep prints how many failed and which.

Hydra runs the other jobs and raises the first exception after the last job. Launchers that run jobs in other
processes print the line there.
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
    """The jobs of a sweep that ran in this process."""

    def __init__(self) -> None:
        self.started = 0
        self.failed: list[str] = []
        self.bugs = 0
        self.swept: set[str] = set()  # the keys with several values; a job is named by its values of them

    def note_words(self, words: Iterable[str]) -> None:
        """Find the keys that have several values on the command line."""
        parser = OverridesParser.create()
        for word in words:
            with suppress(HydraException):  # a flag, or a word that Hydra will refuse
                if parser.parse_override(word).is_sweep_override():
                    self.swept.add(word.partition("=")[0])

    def note_failure(self, exc: Exception) -> None:
        """Print why the last job failed: one line, or the traceback of a bug."""
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
        """Print which jobs failed, and return the exit code."""
        which = "; ".join(self.failed)
        print(f"exnorm: {len(self.failed)} of {self.started} jobs failed: {which}", file=sys.stderr, flush=True)
        return EXIT_BUG if self.bugs else EXIT_USER_ERROR


SWEEP = Sweep()

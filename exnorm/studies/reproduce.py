"""`exnorm reproduce STUDY`: run the missing runs of a study, several at the same time.

The command can be killed at any moment; the same command then continues. It skips finished runs and resumes the others
from their checkpoints, as `exnorm train` does. A failed run does not stop the others. The record is updated after each
run. Several commands, on one machine or on several that share a file system, divide the runs among them: each claims a
run before it starts it.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from exnorm.config.errors import BUG, UserError
from exnorm.config.explain import refused_file
from exnorm.config.study import Key, Study
from exnorm.engine.job import outside_of_job
from exnorm.runs.folder import NOT_FINITE, RunFolder
from exnorm.runs.lock import FileLock, Locked
from exnorm.runs.provenance import STUDY
from exnorm.runs.records import record_file
from exnorm.runs.subprocesses import (
    END_WITH_PARENT,
    available_cores,
    heeded_signals,
    importing_environment,
    say_in_handler,
)
from exnorm.studies.collect import add_to_record, collect
from exnorm.studies.estimate import estimate_of
from exnorm.studies.plan import LABELS, Job, RunKey, by_run, trainings_of
from exnorm.studies.recorded import lacking

LOCK_PAUSE_S = 0.5
CLAIM_PAUSE_S = 2.0
CLAIMS = ".claims"  # the folder of the claims, in that of the runs
ERROR = "exnorm: error: "


Ended = tuple[int, list[str]]  # exit code and lines of a command


class Failed(Exception):
    """A run ended without a result. The message is its last line."""


Problems = dict[str, str]  # error messages by the title of the job


def reproduce(
    study: Study, jobs: Sequence[Job], results: Path, *, at_once: int | None, make_runner: "MakeRunner | None" = None
) -> int:
    """Run the missing runs and write the record. Return the exit code: 0, 1 if a run failed, 128 + n after signal n.

    Args:
        at_once: the number of runs at the same time. By default, as many as there are cores for.
        make_runner: returns what runs the commands. By default, processes of this machine do.

    Raises:
        UserError: data are missing, or a setting cannot work; nothing was run.
    """
    check_data(jobs)
    check_settings(jobs)
    notes, damaged = collect(study, jobs, results)
    for note in notes:
        print(note)
    waiting = [job for job in jobs if job.title not in damaged and not job.finished()]
    done = len(jobs) - len(waiting) - len(damaged)
    print(f"{study.id} at scale {study.scale}: {done} of {len(jobs)} runs are done{elsewhere(study, waiting, results)}")
    at_once = at_once or (max(1, available_cores() // study.threads) if study.threads else 1)
    runner = (make_runner or Runner)(study, results, waiting)
    with runner.forwarding_signals(), ThreadPoolExecutor(at_once) as pool:
        for thread in [pool.submit(runner.work) for _ in range(at_once)]:
            thread.result()
    if runner.signum:
        print(f"exnorm: stopped. Type the same command again to continue with {study.id}", file=sys.stderr)
        return 128 + runner.signum
    print(f"record: {record_file(results, study.id)}. To see it, type exnorm table {study.named} --scale {study.scale}")
    problems = damaged | runner.problems
    for title in [job.title for job in jobs if job.title in problems]:
        print(f"failed: {title}: {problems[title]}", file=sys.stderr)
    return 1 if problems else 0


def elsewhere(study: Study, left: Sequence[Job], results: Path) -> str:
    """Return a text with the number of remaining runs that the record has without a run folder; empty if none."""
    lacks = {job.title for job in lacking(study, left, results)}
    known = sum(job.title not in lacks for job in left if job.cell is not None and not job.diverged())
    return (
        f"; {known} more are in the record, but their run folders are not here, so they run again. --skip-recorded "
        "leaves them out"
        if known
        else ""
    )


def check_data(jobs: Iterable[Job]) -> None:
    """Refuse runs whose data are missing.

    Raises:
        UserError: data are missing.
    """
    problems = list(dict.fromkeys(job.problem for job in jobs if job.config_hash is None))
    if problems:
        raise UserError(problems[0])


def check_settings(jobs: Iterable[Job]) -> None:
    """Refuse settings that cannot work. Each cell is checked once.

    Raises:
        UserError: a setting cannot work.
    """
    for job in {job.name: job for job in jobs}.values():
        job.check()


class Runner:
    """Starts each run as a subprocess, which ends with this process, and forwards signals to it."""

    def __init__(self, study: Study, results: Path, jobs: Sequence[Job]) -> None:
        self.study, self.results, self.total = study, results, len(jobs)
        self.signum = 0
        self.done = 0
        self.problems: Problems = {}
        self._waiting = by_run(jobs)
        self._active: set[RunKey] = set()
        self._processes: set[subprocess.Popen[str]] = set()
        self._changing = threading.Lock()
        self._taking = threading.Lock()

    def work(self) -> None:
        """Do the jobs of one run after the other, until none is left; other threads and commands do the same."""
        while (taken := self._take()) is not None:
            key, jobs, claim = taken
            try:
                with claim:
                    self.problems |= self.run_all(jobs)
            finally:
                with self._taking:
                    self._active.remove(key)

    def _take(self) -> tuple[RunKey, list[Job], AbstractContextManager[Any]] | None:
        """Claim a run that no other command works on, once the run that it begins with has ended; None at the end."""
        while True:
            with self._taking:
                if self.signum or not self._waiting:
                    return None
                for key, jobs in self._waiting.items():
                    source = jobs[-1].needs
                    if source is not None and source.run_key in (self._waiting.keys() | self._active):
                        continue
                    try:
                        claim = claimed(jobs[-1])
                    except OSError as problem:  # such as a full disk
                        line = _line_of(problem)
                        self.problems |= {job.title: line for job in self._waiting.pop(key)}
                        break
                    if claim is not None:
                        self._active.add(key)
                        return key, self._waiting.pop(key), claim
            time.sleep(CLAIM_PAUSE_S)

    def run_all(self, jobs: Sequence[Job]) -> Problems:
        """Do the jobs of one run: the training, then its evaluations. Return the problems by the title of the job."""
        needed = jobs[-1].needs
        if needed is not None and needed.title in self.problems:
            return {job.title: "the run that it begins with failed" for job in jobs}
        problems: Problems = {}
        for job in jobs:
            try:
                self.run(job)
            except (Failed, UserError, OSError) as problem:
                line = problems[job.title] = _line_of(problem)
                if not job.trained():
                    return {job.title: line for job in jobs}
        return problems

    def run(self, job: Job) -> None:
        """Train, evaluate and record one job.

        Raises:
            Failed: the job ended without a result.
        """
        started = time.monotonic()
        try:
            arguments = job.arguments()
        except UserError as problem:
            raise Failed(str(problem)) from None
        folder = job.folder()
        assert folder is not None
        self._train(folder, arguments, job)
        if job.cell is not None and job.cell.evaluate and job.evaluation() is None:
            self._exnorm(["eval", str(folder.path), *job.cell.evaluate], job)
            if job.evaluation() is None:
                raise Failed(_without_result("eval", folder))
        for look in job.looks:
            file = job.look_file(look)
            if not file.is_file():
                self._exnorm(["ratios", str(folder.path), *_looking(job, look)], job)
                if not file.is_file():
                    raise Failed(_without_result("ratios", folder))
        if job.cell is not None:
            add_to_record(self.study, job, self.results)
        with self._changing:
            self.done += 1
            print(
                f"[{self.done}/{self.total}] {job.title}: {_result(job)}, {(time.monotonic() - started) / 60:.1f} min",
                flush=True,
            )

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """In this context a stop signal ends each run with a checkpoint, and no other starts. A second Ctrl-C kills."""

        def stop(signum: int, frame: FrameType | None) -> None:
            again = signum == self.signum == signal.SIGINT
            if not self.signum:
                say_in_handler("stopping: each run ends its step and writes a checkpoint")
            self.signum = signum
            self.send_signal(signal.SIGKILL if again else signal.SIGTERM)

        before = {signum: signal.signal(signum, stop) for signum in heeded_signals()}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _train(self, folder: RunFolder, arguments: list[str], job: Job) -> None:
        """Train until the run has finished. A run that diverges is recorded as a result and not tried again.

        For a finished run without its configuration, `exnorm train` writes only that.
        """
        while not folder.is_complete():
            while folder.is_locked() and not self.signum:  # another study trains it, or a killed run is ending
                time.sleep(LOCK_PAUSE_S)
            step = folder.diverged_at()
            if step is not None:
                if job.cell is not None:
                    add_to_record(self.study, job, self.results)
                raise Failed(f"{NOT_FINITE} {step}; remove {folder.path} to try it again")
            if not folder.is_complete():
                self._try_to_train(folder, arguments, job)

    def _try_to_train(self, folder: RunFolder, arguments: list[str], job: Job) -> None:
        """Try once. Another process may have just started this run, or finished it; or the run may diverge."""
        try:
            self._exnorm(["train", *arguments], job)
        except Failed:
            if self.signum or not (folder.is_locked() or folder.diverged_at() or folder.is_complete()):
                raise
        else:
            if not folder.is_complete():
                raise Failed(_without_result("train", folder))

    def _exnorm(self, arguments: list[str], job: Job) -> None:
        variables = {
            END_WITH_PARENT: "1",
            STUDY: json.dumps({"id": self.study.id, "scale": self.study.scale, "cell": job.name, "seed": job.seed}),
        }
        if self.study.threads:
            variables["OMP_NUM_THREADS"] = str(self.study.threads)
        code, lines = self.execute(arguments, variables)
        if code:
            told = [line.partition(ERROR)[2] for line in lines if ERROR in line]
            last = [line for line in lines if line.strip() and line != BUG]
            raise Failed((told or last or [f"exit code {code}"])[-1])

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to each command that runs now."""
        for process in list(self._processes):
            process.send_signal(signum)

    def execute(self, arguments: Sequence[str], variables: Mapping[str, str]) -> Ended:
        """Run a command with some variables in its environment.

        Raises:
            Failed: a signal came, so no command starts any more.
        """
        with self._changing:
            if self.signum:
                raise Failed("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "exnorm", *arguments],
                env=outside_of_job(importing_environment()) | dict(variables),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches it only through `forwarding_signals`
            )
            self._processes.add(process)
        if self.signum:  # the signal came in between
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        code = process.wait()
        self._processes.discard(process)
        return code, lines


MakeRunner = Callable[[Study, Path, Sequence[Job]], Runner]


def claimed(job: Job) -> AbstractContextManager[Any] | None:
    """Return a claim on the run of a job, held until its end; None if another command has it."""
    folder = job.folder()
    if folder is None:  # the run that it begins with has failed
        return nullcontext()
    try:
        return FileLock(job.runs / CLAIMS / f"{folder.path.parent.name}-{folder.path.name}.lock")
    except Locked:
        return None


def _line_of(problem: Exception) -> str:
    return refused_file(problem) or str(problem)


def _without_result(verb: str, folder: RunFolder) -> str:
    return (
        f"exnorm {verb} ended without an error, but {folder.path} has no result: the data or the initial weights have "
        "changed since this command began. Type the same command again; it then reads the new ones"
    )


def _looking(job: Job, look: str) -> list[str]:
    """Return the options of `exnorm ratios` that measure what a job asks for."""
    assert job.cell is not None
    return ["--wrong-labels"] if look == LABELS else ["--by-class", *job.cell.evaluate]


def _result(job: Job) -> str:
    folder = job.folder()
    record = None if folder is None else folder.read_record()
    result: dict[str, Any] = (job.evaluation() or {}) if job.cell is not None and job.cell.evaluate else record or {}
    primary = job.primary
    return f"{primary.label} {result.get(primary.key, float('nan')):.{primary.digits}f}"


def _by_cell(jobs: Iterable[Job]) -> dict[Key, list[Job]]:
    groups: dict[Key, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.cell is not None:
            groups[job.cell.key].append(job)
    return groups


def print_plan(study: Study, jobs: Sequence[Job], results: Path, *, images_per_s: float | None) -> None:
    """Print the cells with their seeds, how many are done, and the hours left."""
    from rich.table import Table

    from exnorm.runs.table import print_table

    check_settings(jobs)
    estimate = estimate_of(study, jobs, results, images_per_s)
    left = [job for job in jobs if not (job.finished() or job.diverged())]
    table = Table(*study.axes, "seeds", "done", "hours left", box=None, pad_edge=False)
    to_train = [job for job in trainings_of(left) if not job.trained()]
    planned, undone, untrained = (_by_cell(some) for some in (jobs, left, to_train))
    for key, own in planned.items():
        labels = [study.label(value) for _, value in key]
        hours = estimate.hours(untrained[key])  # a shared run: once
        table.add_row(*labels, str(len(own)), str(len(own) - len(undone[key])), hours)
    print_table(table)
    for problem in dict.fromkeys(job.problem for job in jobs if job.problem):
        print(f"missing data: {problem}")
    trainings = trainings_of(jobs)
    evaluations = [job for job in jobs if job.cell is not None and job.cell.evaluate]
    further = f" and {len(evaluations)} evaluations of them" if evaluations else ""
    to_evaluate = sum(job.cell is not None and bool(job.cell.evaluate) for job in left)
    to_do = f"{len(to_train)} and {to_evaluate} evaluations" if evaluations else str(len(to_train))
    unit = "GPU-hours" if study.scale in ("gpu", "full") else "hours on one core"
    print(
        f"{study.id} at scale {study.scale}: {len(trainings)} runs{further}; {len(trainings) - len(to_train)} runs "
        f"done, {to_do} left: {estimate.hours(to_train)} {unit}{elsewhere(study, left, results)}"
    )
    for primary, speed in estimate.speeds.items():
        rate = f"{speed.images_per_s:.0f} images/s of one device, " if speed.images_per_s else ""
        print(f"speed{'' if primary == study.primary else ' of the sources'}: {rate}{speed.source}")

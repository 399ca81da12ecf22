"""`exnorm reproduce STUDY`: run what is missing of a study, several runs at once; killed at any moment it goes on.

A finished run is not run again and one that was killed goes on from its checkpoint, as `exnorm train` does. A run that
fails stops no other. The record is brought up to date after each run.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from exnorm.config.errors import UserError
from exnorm.config.study import Study
from exnorm.runs.children import END_WITH_PARENT, available_cores, importing_environment
from exnorm.runs.folder import NOT_FINITE, RunFolder
from exnorm.runs.provenance import STUDY
from exnorm.studies.collect import add_to_record, collect
from exnorm.studies.estimate import Speed, hours_left, measured_hours, speed_of
from exnorm.studies.plan import Job, trainings_of

LOCK_PAUSE_S = 0.5
ERROR = "exnorm: error: "


class Failed(Exception):
    """A run that ended without a result; the message is its last line."""


def reproduce(study: Study, jobs: Sequence[Job], results: Path, *, at_once: int | None) -> int:
    """Run what is missing and write the record; return the exit code: 0, 1 where a run failed, 128 + n after signal n.

    Raises:
        UserError: data that are not there; nothing was run.
    """
    check_data(jobs)
    for job in {job.name: job for job in jobs}.values():
        job.check()
    for note in collect(study, jobs, results):
        print(note)
    waiting = [job for job in jobs if not job.finished()]
    print(f"{study.id} at scale {study.scale}: {len(jobs) - len(waiting)} of {len(jobs)} runs are done")
    at_once = at_once or (max(1, available_cores() // study.threads) if study.threads else 1)
    runner = Runner(study, results, total=len(waiting))
    failures: list[str] = []
    crashes: list[BaseException] = []
    with runner.forwarding_signals(), ThreadPoolExecutor(at_once) as pool:
        futures: dict[int, Future[None]] = {}
        for job in waiting:
            source = futures.get(id(job.needs)) if job.needs is not None else None
            futures[id(job)] = pool.submit(runner.run, job, source)
        for job in waiting:
            problem = futures[id(job)].exception()
            if isinstance(problem, Failed):
                failures.append(f"{job.name}, seed {job.seed}: {problem}")
            elif problem is not None:
                failures.append(f"{job.name}, seed {job.seed}: {type(problem).__name__}")
                crashes.append(problem)
    if runner.signum:
        print(f"exnorm: stopped; the same command goes on with {study.id}", file=sys.stderr)
        return 128 + runner.signum
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if crashes:
        raise crashes[0]
    return 1 if failures else 0


def check_data(jobs: Iterable[Job]) -> None:
    """Refuse runs whose data are not there.

    Raises:
        UserError: they are not.
    """
    problems = list(dict.fromkeys(job.problem for job in jobs if job.config_hash is None))
    if problems:
        raise UserError(problems[0])


class Runner:
    """Starts runs as processes of their own, which end with this one, and passes signals on to them."""

    def __init__(self, study: Study, results: Path, *, total: int) -> None:
        self.study, self.results, self.total = study, results, total
        self.signum = 0
        self.done = 0
        self._processes: set[subprocess.Popen[str]] = set()
        self._changing = threading.Lock()
        self._folders: dict[Path, threading.Lock] = {}

    def run(self, job: Job, source: "Future[None] | None") -> None:
        """Train, evaluate and record one job.

        Raises:
            Failed: without a result.
        """
        if source is not None and source.exception() is not None:
            raise Failed("the run that it begins with failed")
        started = time.monotonic()
        try:
            arguments = job.arguments()
        except UserError as problem:
            raise Failed(str(problem)) from None
        folder = job.folder()
        assert folder is not None
        with self._alone_in(folder.path):  # cells may share a run
            self._train(folder, arguments, job)
            if job.cell is not None and job.cell.evaluate and job.evaluation() is None:
                self._exnorm(["eval", str(folder.path), *job.cell.evaluate], job)
            if job.cell is not None and job.by_class and not job.class_ratios_file().is_file():
                self._exnorm(["ratios", str(folder.path), "--by-class", *job.cell.evaluate], job)
        if job.cell is not None:
            add_to_record(self.study, job, self.results)
        with self._changing:
            self.done += 1
            print(
                f"[{self.done}/{self.total}] {job.name}, seed {job.seed}: {_result(job)}, "
                f"{(time.monotonic() - started) / 60:.1f} min",
                flush=True,
            )

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM end the runs, each with a checkpoint, and no other is started."""

        def stop(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _alone_in(self, path: Path) -> threading.Lock:
        with self._changing:
            return self._folders.setdefault(path, threading.Lock())

    def _train(self, folder: RunFolder, arguments: list[str], job: Job) -> None:
        """Train what has not finished; a run that diverges is a result, too: it is recorded and not tried again."""
        while folder.read_record() is None:
            while folder.is_locked() and not self.signum:  # by another study, or a killed one that is ending
                time.sleep(LOCK_PAUSE_S)
            step = folder.diverged_at()
            if step is not None:
                if job.cell is not None:
                    add_to_record(self.study, job, self.results)
                raise Failed(f"{NOT_FINITE} {step}; remove {folder.path} to try it again")
            if folder.read_record() is None:
                self._try_to_train(folder, arguments, job)

    def _try_to_train(self, folder: RunFolder, arguments: list[str], job: Job) -> None:
        """One attempt, which may find that another process has just begun, or that the run diverges."""
        try:
            self._exnorm(["train", *arguments], job)
        except Failed:
            if self.signum or not (folder.is_locked() or folder.diverged_at()):
                raise

    def _exnorm(self, arguments: list[str], job: Job) -> None:
        environment = importing_environment() | {
            END_WITH_PARENT: "1",
            STUDY: json.dumps({"id": self.study.id, "scale": self.study.scale, "cell": job.name, "seed": job.seed}),
        }
        if self.study.threads:
            environment["OMP_NUM_THREADS"] = str(self.study.threads)
        with self._changing:
            if self.signum:
                raise Failed("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "exnorm", *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches it through `forwarding_signals` alone
            )
            self._processes.add(process)
        if self.signum:  # it came in between
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        code = process.wait()
        self._processes.discard(process)
        if code:
            told = [line.partition(ERROR)[2] for line in lines if ERROR in line]
            raise Failed((told or [line for line in lines if line.strip()] or [f"exit code {code}"])[-1])


def _result(job: Job) -> str:
    folder = job.folder()
    record = None if folder is None else folder.read_record()
    result: dict[str, Any] = (job.evaluation() or {}) if job.cell is not None and job.cell.evaluate else record or {}
    return f"top-1 {result.get('val/top1', float('nan')):.2f}"


def print_plan(study: Study, jobs: Sequence[Job], results: Path, *, images_per_s: float | None) -> None:
    """List the cells with their seeds, which are done, and the hours that are left."""
    from rich.table import Table

    from exnorm.runs.table import print_table

    speed, measured_h = speed_of(study, results, images_per_s), measured_hours(study, results)
    left = [job for job in jobs if not job.finished()]
    table = Table(*study.axes, "seeds", "done", "hours left", box=None, pad_edge=False)
    to_train = [job for job in trainings_of(left) if not job.trained()]
    for cell in dict.fromkeys(job.cell for job in jobs if job.cell is not None):
        own = [job for job in jobs if job.cell == cell]
        labels = [study.label(value) for _, value in cell.key]
        done = sum(job not in left for job in own)
        hours = _hours([job for job in to_train if job.cell == cell], speed, measured_h)  # of several cells' run: once
        table.add_row(*labels, str(len(own)), str(done), hours)
    print_table(table)
    for problem in dict.fromkeys(job.problem for job in jobs if job.problem):
        print(f"not here: {problem}")
    trainings = trainings_of(jobs)
    evaluations = [job for job in jobs if job.cell is not None and job.cell.evaluate]
    further = f" and {len(evaluations)} evaluations of them" if evaluations else ""
    unit = "GPU-hours" if study.scale == "full" else "hours on one core"
    print(
        f"{study.id} at scale {study.scale}: {len(trainings)} runs{further}; {len(trainings) - len(to_train)} runs "
        f"done, {len(to_train)} left: {_hours(to_train, speed, measured_h)} {unit}"
    )
    print(f"speed: {f'{speed.images_per_s:.0f} images/s, ' if speed.images_per_s else ''}{speed.source}")


def _hours(jobs: Sequence[Job], speed: Speed, measured_h: dict[str, float]) -> str:
    hours = hours_left(jobs, speed, measured_h)
    return "unknown" if hours is None else f"{hours:.1f}"

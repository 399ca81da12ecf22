"""A study on a cluster, through submitit: each run that is missing, with the evaluations of it, is a job of its own.

A job is `exnorm reproduce` for the cells of one run and one seed, so it skips what is done, goes on from a checkpoint
and writes the record; one that is preempted or runs out of time is queued again. Of runs that begin with a checkpoint
of another one, the first trains that one, too; the rest is queued when it is there, so that no node waits.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError, suggest
from exnorm.config.study import Study
from exnorm.runs.subprocesses import importing_environment
from exnorm.studies.plan import Job, RunKey, by_run
from exnorm.studies.reproduce import check_data

CLUSTERS = ("slurm", "local")


class Reproduction:
    """What a job does; picklable, and queued again as it is when the cluster takes its node away."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.commands = [list(command) for command in commands]

    def __call__(self) -> None:
        """Run the commands one after the other; raise CalledProcessError where one fails."""
        for command in self.commands:
            subprocess.run([sys.executable, "-m", "exnorm", *command], env=importing_environment(), check=True)

    def checkpoint(self) -> Any:
        """What submitit queues instead when it is stopped: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(study: Study, jobs: Sequence[Job], runs: Path, results: Path, options: Sequence[str]) -> None:
    """Queue the runs that are missing; `options` are submitit's parameters, such as `gpus_per_node=8`.

    Raises:
        UserError: submitit is not installed, or an option is none of its.
    """
    executor = _executor(study, runs, options)
    check_data(jobs)
    sources: dict[RunKey, str] = {}  # a run that others begin with: the job that trains it
    queued = 0
    for group in by_run(job for job in jobs if job.cell is not None and not job.finished()).values():
        titles, source = "; ".join(job.title for job in group), group[0].needs
        if source is not None and source.run_key in sources:
            print(f"not queued: {titles}: begins with what job {sources[source.run_key]} trains; submit again after it")
            continue
        job_id = executor.submit(Reproduction([_command(study, job, runs, results) for job in group])).job_id
        queued += 1
        print(f"job {job_id}: {titles}")
        if source is not None and not source.trained():
            sources[source.run_key] = job_id
    print(f"{queued} jobs queued; exnorm reproduce {study.named} --scale {study.scale} --plan shows what is done")


def _executor(study: Study, runs: Path, options: Sequence[str]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--submit needs submitit: pip install submitit") from None
    parameters = dict(_parameter(word) for word in options)
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in CLUSTERS:
        raise UserError(f"--submit cluster={cluster}: {suggest(str(cluster), CLUSTERS)}")
    try:
        executor = submitit.AutoExecutor(folder=runs.resolve() / ".submitted", cluster=cluster)
        executor.update_parameters(name=study.id, **parameters)
    except (NameError, TypeError, RuntimeError, AssertionError) as problem:
        said = " ".join(str(problem).split()) or f"{' '.join(options)} does not fit"
        raise UserError(f"--submit: {said}; without SLURM: --submit cluster=local") from None
    return executor


def _command(study: Study, job: Job, runs: Path, results: Path) -> list[str]:
    assert job.cell is not None
    name = str(Path(study.named).resolve()) if Path(study.named).is_file() else study.named
    chosen = [
        word for axis, value in (*job.cell.key, ("seed", str(job.seed))) for word in ("--only", f"{axis}={value}")
    ]
    folders = ["--runs", str(runs.resolve()), "--results", str(results.resolve())]
    seeds = ["--seeds", str(job.seed + 1)]  # so that there is this one, however many the study has by itself
    return ["reproduce", name, "--scale", study.scale, "--jobs", "1", *seeds, *chosen, *folders]


def _parameter(word: str) -> tuple[str, int | str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"--submit {word}: write KEY=VALUE, such as --submit gpus_per_node=8")
    return key, int(value) if value.isdigit() else value

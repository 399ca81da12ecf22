"""`exnorm reproduce --submit`: run a study on a cluster, through submitit.

Each missing run, with its evaluations, is a job: `exnorm reproduce` for the cells of one run and one seed. So it skips
finished work, continues from a checkpoint and writes the record. A job that is preempted or runs out of time is queued
again. If several runs begin with a checkpoint of one source, the first job also trains the source. Submit again for the
other runs when that job has finished; so no node waits.
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
    """The work of a job. It can be pickled, and is queued again unchanged when the cluster takes its node away."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self.commands = [list(command) for command in commands]

    def __call__(self) -> None:
        """Run the commands one after the other. Raise CalledProcessError if one fails."""
        for command in self.commands:
            subprocess.run([sys.executable, "-m", "exnorm", *command], env=importing_environment(), check=True)

    def checkpoint(self) -> Any:
        """Return the job that submitit queues when this one is stopped: the same job, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(study: Study, jobs: Sequence[Job], runs: Path, results: Path, options: Sequence[str]) -> None:
    """Queue the missing runs. `options` are parameters of submitit, such as `gpus_per_node=8`.

    Raises:
        UserError: submitit is not installed, or does not accept an option.
    """
    executor = _executor(study, runs, options)
    check_data(jobs)
    sources: dict[RunKey, str] = {}  # the run of a source: the job that trains it
    queued = 0
    for group in by_run(job for job in jobs if job.cell is not None and not job.finished()).values():
        titles, source = "; ".join(job.title for job in group), group[0].needs
        if source is not None and source.run_key in sources:
            print(f"not queued: {titles}: needs what job {sources[source.run_key]} trains. Submit again after it")
            continue
        job_id = executor.submit(Reproduction([_command(study, job, runs, results) for job in group])).job_id
        queued += 1
        print(f"job {job_id}: {titles}")
        if source is not None and not source.trained():
            sources[source.run_key] = job_id
    print(f"{queued} jobs queued. exnorm reproduce {study.named} --scale {study.scale} --plan shows what is done")


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
        said = " ".join(str(problem).split()) or f"submitit refuses {' '.join(options)}"
        raise UserError(f"--submit: {said}. Without SLURM, type --submit cluster=local") from None
    return executor


def _command(study: Study, job: Job, runs: Path, results: Path) -> list[str]:
    assert job.cell is not None
    name = str(Path(study.named).resolve()) if Path(study.named).is_file() else study.named
    chosen = [
        word for axis, value in (*job.cell.key, ("seed", str(job.seed))) for word in ("--only", f"{axis}={value}")
    ]
    folders = ["--runs", str(runs.resolve()), "--results", str(results.resolve())]
    seeds = ["--seeds", str(job.seed + 1)]  # so that this seed exists, even if the study has fewer seeds
    return ["reproduce", name, "--scale", study.scale, "--jobs", "1", *seeds, *chosen, *folders]


def _parameter(word: str) -> tuple[str, int | str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"--submit {word}: write KEY=VALUE, such as --submit gpus_per_node=8")
    return key, int(value) if value.isdigit() else value

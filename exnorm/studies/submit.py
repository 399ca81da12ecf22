"""`--submit`: run a study or a training on a cluster, through submitit.

Of a study each missing run, with its evaluations, is a job: `exnorm reproduce` for the cells of one run and one seed.
So it skips finished work, continues from a checkpoint and writes the record. If several runs begin with a checkpoint of
one source, the first job also trains the source. Submit again for the other runs when that job has finished; so no node
waits. A job that is preempted or runs out of time is queued again.

On several nodes a job has a task for each GPU. They train together (`exnorm.engine.in_job`).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError, suggest
from exnorm.config.study import Study
from exnorm.config.words import check_options, in_hydras_quotes, is_sweep, with_home
from exnorm.engine.job import TOGETHER, port_of
from exnorm.runs.subprocesses import importing_environment
from exnorm.studies.plan import Job, RunKey, by_run
from exnorm.studies.reproduce import check_data

CLUSTERS = ("slurm", "local")
TIMES_QUEUED = 1000  # a long training takes many allocations; submitit's default is 3
SAVING_S = 60  # from the warning of the cluster until a checkpoint is there; submitit asks for it 90 s before the end
POLL_S = 0.2


class Commands:
    """The work of a job: commands of exnorm. It can be pickled, and is queued again when the cluster takes a node away.

    Args:
        folder: a folder that all nodes see, for a file that says that the job is done.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path) -> None:
        self.commands = [list(command) for command in commands]
        self.folder = str(folder)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the commands one after the other. Raise CalledProcessError if one fails."""
        import submitit

        place = submitit.JobEnvironment()
        again = os.environ.get("SLURM_RESTART_COUNT", "0")
        done = Path(self.folder) / f"{place.job_id}-{again}.done"
        environment = importing_environment() | _described_by_submitit(place)
        if place.global_rank > 0:
            self._follow(environment, done)
            return
        try:
            for command in self.commands:
                self._run(command, environment)
        except Exception:  # not SystemExit, with which submitit queues the job again
            done.touch()
            raise
        done.touch()

    def checkpoint(self) -> Any:
        """Let the command write a checkpoint; return the job that submitit queues: the same one, which continues."""
        from submitit.helpers import DelayedSubmission

        process, end = self._process, time.monotonic() + SAVING_S
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGUSR2)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
        return DelayedSubmission(Commands(self.commands, Path(self.folder)))

    def _run(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "exnorm", *command], env=environment)
        while self._process.poll() is None:  # not wait(), whose lock `checkpoint` in a signal handler would need
            time.sleep(POLL_S)
        if self._process.returncode:
            raise subprocess.CalledProcessError(self._process.returncode, self._process.args)

    def _follow(self, environment: dict[str, str], done: Path) -> None:
        """Take part in each training of the first task, until its commands are done."""
        while not done.exists():
            self._process = subprocess.Popen([sys.executable, "-m", "exnorm", "train"], env=environment)
            while self._process.poll() is None and not done.exists():
                time.sleep(POLL_S)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()  # it waits for a training that does not come
            self._process.wait()


def submit(study: Study, jobs: Sequence[Job], runs: Path, results: Path, options: Sequence[str]) -> None:
    """Queue the missing runs of a study. `options` are parameters of submitit, such as `gpus_per_node=8`.

    Raises:
        UserError: submitit is not installed, or does not accept an option.
    """
    folder = _folder(runs)
    executor = _executor(study.id, folder, options)
    check_data(jobs)
    sources: dict[RunKey, str] = {}  # the run of a source: the job that trains it
    queued = 0
    for group in by_run(job for job in jobs if job.cell is not None and not job.finished()).values():
        titles, source = "; ".join(job.title for job in group), group[0].needs
        if source is not None and source.run_key in sources:
            print(f"not queued: {titles}: needs what job {sources[source.run_key]} trains. Submit again after it")
            continue
        commands = [_command(study, job, runs, results) for job in group]
        job_id = executor.submit(Commands(commands, folder)).job_id
        queued += 1
        print(f"job {job_id}: {titles}")
        if source is not None and not source.trained():
            sources[source.run_key] = job_id
    count = "1 job" if queued == 1 else f"{queued} jobs"
    print(f"{count} queued. exnorm reproduce {study.named} --scale {study.scale} --plan shows what is done")


def submit_training(words: Sequence[str], options: Sequence[str]) -> None:
    """Queue a training. `words` are the settings of `exnorm train`, and `options` parameters of submitit.

    Raises:
        UserError: a setting is wrong, or submitit is not installed or does not accept an option.
    """
    from exnorm.config.compose import check_train, compose_train

    check_options(words)
    if is_sweep(words):
        raise UserError("--submit queues one training. Type the command for each run, or write a study for all of them")
    settings = [with_home(word) for word in words]
    config = compose_train(settings)
    check_train(config)
    runs = Path(config.runs).resolve()
    folder = _folder(runs)
    name = f"{config.model.name}-{config.norm.name}-{config.batch}"
    command = ["train", *settings, f"runs={in_hydras_quotes(str(runs))}"]
    job_id = _executor(name, folder, options).submit(Commands([command], folder)).job_id
    print(f"job {job_id}: {name}. Its output is in {folder}; exnorm runs {runs} lists the runs")


def _folder(runs: Path) -> Path:
    return runs.resolve() / ".submitted"


def _executor(name: str, folder: Path, options: Sequence[str]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--submit needs submitit: pip install submitit") from None
    parameters = dict(_parameter(word) for word in options)
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in CLUSTERS:
        raise UserError(f"--submit cluster={cluster}: {suggest(str(cluster), CLUSTERS)}")
    if int(parameters.get("nodes", 1)) > 1:  # one task for each GPU, as torchrun starts them
        parameters.setdefault("tasks_per_node", parameters.get("gpus_per_node", 1))
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=TIMES_QUEUED)
        executor.update_parameters(name=name, **parameters)
    except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as problem:
        said = " ".join(str(problem).split()) or f"submitit refuses {' '.join(options)}"
        raise UserError(f"--submit: {said}. Without SLURM, type --submit cluster=local") from None
    return executor


def _described_by_submitit(place: Any) -> dict[str, str]:
    """Return what tells `exnorm train` its place among the tasks of a job; nothing if there is one task."""
    if place.num_tasks == 1:
        return {}
    return {
        "RANK": str(place.global_rank),
        "WORLD_SIZE": str(place.num_tasks),
        "LOCAL_RANK": str(place.local_rank),
        "GROUP_RANK": str(place.node),
        "MASTER_ADDR": place.hostnames[0],
        "MASTER_PORT": str(port_of(place.job_id)),
        TOGETHER: "1",
    }


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

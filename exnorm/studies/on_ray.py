"""`exnorm reproduce STUDY --ray`: every training and evaluation of a study is a task of a Ray cluster.

This process claims the runs, hands their commands to Ray and writes the record, as it does with processes of its own.
Ray chooses the machines and the GPUs. All machines see the folders of the runs and of the data under the same paths,
and have the same Python environment. If a machine is lost, Ray starts the command again on another one, where it
continues from the last checkpoint.
"""

import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from exnorm.config.errors import UserError
from exnorm.config.study import Study
from exnorm.engine.job import outside_of_job
from exnorm.runs.folder import write_text_atomic
from exnorm.runs.subprocesses import importing_environment
from exnorm.studies.plan import Job
from exnorm.studies.reproduce import CLAIMS, Ended, Failed, Runner, reproduce

CARRIED = ("EXNORM_", "PYTHON", "WANDB_")  # beginnings of the variables that the commands get from this process
MOST = 256  # commands that Ray has at the same time, running or waiting
POLL_S = 0.5


class Share(NamedTuple):
    """What a command takes of a machine; the cores are its threads."""

    gpus: int
    cores: int


def reproduce_on_ray(
    study: Study, jobs: Sequence[Job], runs: Path, results: Path, *, at_once: int | None, gpus: int | None
) -> int:
    """Run the missing runs of a study on a Ray cluster, write the record, and return the exit code of `reproduce`.

    Args:
        at_once: the most runs at the same time. By default, as many as Ray finds place for.
        gpus: GPUs of each run. By default 1 if the cluster has GPUs.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or no machine has so many GPUs.
    """
    share = _connect(study, gpus)
    import ray

    stop_file = runs.absolute() / CLAIMS / f"stop-{secrets.token_hex(8)}"
    try:
        make_runner = partial(RayRunner, share=share, stop_file=stop_file)
        return reproduce(study, jobs, results, at_once=at_once or MOST, make_runner=make_runner)
    finally:
        stop_file.unlink(missing_ok=True)
        ray.shutdown()  # it ends a cluster that was started here


class RayRunner(Runner):
    """A `Runner` whose commands are tasks of Ray.

    Args:
        stop_file: a path that all machines see. The commands get the signal whose number is in this file.
    """

    def __init__(self, study: Study, results: Path, jobs: Sequence[Job], *, share: Share, stop_file: Path) -> None:
        import ray

        super().__init__(study, results, jobs)
        self._task = ray.remote(run_command).options(num_gpus=share.gpus, num_cpus=share.cores)
        self._threads = max(1, share.cores // max(1, share.gpus))
        self._stop_file = stop_file

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to all running commands; those that wait do not begin."""
        write_text_atomic(self._stop_file, str(int(signum)))

    def execute(self, arguments: Sequence[str], variables: Mapping[str, str]) -> Ended:
        """Run a command on the cluster.

        Raises:
            Failed: a signal came, so no command starts any more.
        """
        import ray
        from ray.exceptions import RayError

        if self.signum:
            raise Failed("stopped")
        carried = {key: value for key, value in importing_environment().items() if key.startswith(CARRIED)}
        carried["OMP_NUM_THREADS"] = str(self._threads)  # else Ray sets it to the cores of the whole run
        task = self._task.remote(list(arguments), {**carried, **variables}, os.getcwd(), str(self._stop_file))
        try:
            return ray.get(task)
        except RayError as problem:
            return 1, [f"Ray lost the command: {str(problem).strip().splitlines()[-1]}"]


def run_command(arguments: Sequence[str], variables: Mapping[str, str], here: str, stop_file: str) -> Ended:
    """Run an exnorm command in a folder, in a process that ends with this one and gets the signal in `stop_file`."""
    if _number_in(stop_file):
        return 128 + signal.SIGTERM, ["stopped"]
    inlet, outlet = os.pipe()  # not stdin=PIPE, which `communicate` closes at once
    with open(outlet, "wb"), open(inlet, "rb") as stdin:
        process = subprocess.Popen(
            [sys.executable, "-m", "exnorm", *arguments],
            cwd=here,
            env=outside_of_job(os.environ) | dict(variables),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        sent = 0
        while True:
            try:
                text, _ = process.communicate(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                if (signum := _number_in(stop_file)) != sent:
                    process.send_signal(signum)
                    sent = signum
            else:
                return process.returncode, text.splitlines()


def _number_in(file: str) -> int:
    try:
        return int(Path(file).read_text())
    except FileNotFoundError:
        return 0


def _connect(study: Study, gpus: int | None) -> Share:
    """Connect to a Ray cluster, or start one on this machine, and return what each command takes."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--ray needs Ray: pip install 'exnorm[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as problem:
        raise UserError(f"--ray: {' '.join(str(problem).split())}. RAY_ADDRESS says where the cluster is") from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max(machine.get("GPU", 0) for machine in machines))
    if gpus is None:
        gpus = min(1, most)
    if gpus > most:
        ray.shutdown()
        raise UserError(f"--gpus-per-run {gpus}: a machine of this Ray cluster has at most {most} GPUs")
    if gpus:
        cores = int(min(machine.get("CPU", 1) / machine["GPU"] for machine in machines if machine.get("GPU")) * gpus)
    else:
        all_cores = int(max(machine.get("CPU", 1) for machine in machines))
        cores = min(study.threads or all_cores, all_cores)
    share = Share(gpus, max(1, cores))
    print(f"Ray cluster: {len(machines)} machines; each run has {share.gpus} GPUs and {share.cores} cores")
    return share

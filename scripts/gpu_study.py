"""Run a part of a study on a machine with a GPU that is there for minutes: as many runs as fit, then their record.

    tar czf cifar10.tgz -C "$EXNORM_DATA" cifar10_jpeg                 20 MB; `docs/data.md` says how to get the images
    python scripts/gpu_study.py OUT --data cifar10.tgz                 as many runs as fit into nine minutes
    cp OUT/records/* results/records/                                  then commit them; the same command does the rest

A run that has not finished when the time is over is begun again the next time. `--wheels DIR` installs packages that
the machine lacks, as in `gpu_visit.py`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from gpu_visit import ROOT, environment_with

END_S = 20  # of the time are for the runs to stop and for the record
ENDED_BY_SIGTERM = (128 + signal.SIGTERM, -signal.SIGTERM)  # by itself, or while it was still starting


def main() -> int:
    """Run what the record lacks and return the exit code of `exnorm reproduce`, or 0 if only the time was over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="an archive with the folders of EXNORM_DATA")
    parser.add_argument("--study", default="sn-table2", help="a name, or the absolute path of a YAML file")
    parser.add_argument("--scale", default="gpu")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=VALUE")
    parser.add_argument("--jobs", type=int, default=6, help="runs at the same time")
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--wheels", type=Path)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds - END_S
    records = options.out / "records"
    records.mkdir(parents=True, exist_ok=True)
    for file in (ROOT / "results" / "records").glob(f"{Path(options.study).stem}.*"):
        if not (records / file.name).exists():  # else it has the rows of an earlier call
            shutil.copy(file, records)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(options.data) as archive:
            archive.extractall(folder, filter="data")
        environment = environment_with(options.wheels) | {"EXNORM_DATA": folder}
        words = [word for choice in options.only for word in ("--only", choice)]
        words += ["--jobs", str(options.jobs), "--runs", f"{folder}/runs", "--results", str(options.out)]
        command = [sys.executable, "-m", "exnorm", "reproduce", options.study, "--scale", options.scale]
        process = subprocess.Popen([*command, "--skip-recorded", *words], cwd=ROOT, env=environment)
        try:
            return process.wait(timeout=max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return 0 if process.wait() in ENDED_BY_SIGTERM else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())

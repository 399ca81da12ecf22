"""Measure what limits large data sets, studies and jobs: seconds, bytes and files per image, run and process.

    python scripts/at_scale.py                  every part, in about two minutes on two cores
    python scripts/at_scale.py study jobs       some parts

It appends rows to results/bench/scale.csv, from which results/bench/README.md has a table. docs/at-scale.md says what
follows from them. Everything is measured on one machine and its local disk; Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from exnorm.runs.subprocesses import importing_environment

ROOT = Path(__file__).resolve().parents[1]
ENTRIES, CLASSES, LOADERS = 1_281_167, 1000, 8  # ImageNet's training images
PHOTOGRAPHS = 50  # different ones; the classes have links to them
BATCH, WARM, STEADY = 256, 4, 12  # images, and batches before and in the measurement
CELLS, SEEDS = (4, 11, 3), 5  # a study of 132 cells
COPIES = 1000  # of a run folder
PROCESSES = 1000  # of a job


class Row(NamedTuple):
    """One measured number."""

    part: str
    what: str
    value: float
    unit: str


def main() -> int:
    """Measure the chosen parts, print them and append them to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [default: all]")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")

    import torch

    from exnorm.diagnostics.bench import append, print_rows

    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            rows = [Row(part, *row)._asdict() for row in PARTS[part](Path(folder))]
        print_rows(part, rows)
        append(options.results / "scale.csv", rows, device=torch.device("cpu"))
    return 0


Found = Iterator[tuple[str, float, str]]


def images(folder: Path) -> Found:
    """The loader with a list of as many images and classes as ImageNet has."""
    import random

    from exnorm.diagnostics.bench_data import photograph

    draw = random.Random(0)
    for number in range(PHOTOGRAPHS):
        photograph(draw).save(folder / f"{number}.jpg", quality=92)
    names = [f"n{label:08}/n{label:08}_10026.JPEG" for label in range(CLASSES)]
    for split, count in (("train", ENTRIES), ("val", CLASSES)):
        for label, name in enumerate(names):
            (folder / split / name).parent.mkdir(parents=True)
            os.link(folder / f"{label % PHOTOGRAPHS}.jpg", folder / split / name)
        (folder / f"{split}.txt").write_text("".join(f"{names[at % CLASSES]} {at % CLASSES}\n" for at in range(count)))
        os.utime(folder / f"{split}.txt", (0, 0))
    environment = importing_environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
    numbers = (LOADERS, BATCH, WARM, STEADY)
    command = [sys.executable, "-c", LOADING, str(folder), *map(str, numbers)]
    for start in ("first", "second"):
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        yield f"{ENTRIES} images, {start} start: until the first batch", found["start_s"], "s"
    yield f"{LOADERS} loader processes, steady", found["images_per_s"], "images/s"
    yield f"the trainer and {LOADERS} loader processes together", found["mib"], "MiB"
    yield "of these, the trainer and what it imports, before the data", found["mib_before"], "MiB"


LOADING = """
import json, os, sys, time
from pathlib import Path
import timm.data, torch
from exnorm.config.compose import compose_train
from exnorm.data import fingerprint, load
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.transforms import train_transform

root, loaders, size, warm, steady = sys.argv[1], *map(int, sys.argv[2:])
os.cpu_count = lambda: loaders  # exnorm starts at most one process per core

def mib():
    # Proportional: a page that several processes share counts once.
    pids = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    own = str(os.getpid())
    mine = [pid for pid in pids if pid == own or parent(pid) == own]
    return sum(int(line.split()[1]) for pid in mine for line in open(f"/proc/{pid}/smaps_rollup")
               if line.startswith("Pss:")) / 1024

def parent(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""

config = compose_train(["data=imagefolder", f"data.root={root}", "data.train_list=train.txt",
                        "data.val_list=val.txt", f"data.workers={loaders}"]).data
before, start = mib(), time.perf_counter()
fingerprint(config)
images = load(config).train
batches = TrainBatches(len(images), total=size, seed=0)
loader = iter(Loader(SeededImages(images, train_transform(config), seed=0), batches, workers=loaders,
                     device=torch.device("cpu")))
next(loader)
start_s = time.perf_counter() - start
for _ in range(warm):
    next(loader)
began = time.perf_counter()
for _ in range(steady):
    next(loader)
rate = steady * size / (time.perf_counter() - began)
print(json.dumps({"start_s": round(start_s, 1), "images_per_s": round(rate), "mib": round(mib()),
                  "mib_before": round(before)}), flush=True)
os._exit(0)
"""


def study(folder: Path) -> Found:
    """The commands about a study of 132 cells and 5 seeds, all of which are in the record."""
    from exnorm.config.study import load_study
    from exnorm.runs.records import change_records, read_records, recorded
    from exnorm.studies.plan import jobs_of

    first, second, third = CELLS
    norms = ("bn", "gn", "sn", "en")[:first]
    file = folder / "large.yaml"
    axes = {
        "norm": {norm: [f"norm={norm}"] for norm in norms},
        "rate": {f"r{number}": [f"optim.lr_per_256=0.{number + 1:02}"] for number in range(second)},
        "decay": {f"d{number}": [f"optim.weight_decay=1e-{number + 3}"] for number in range(third)},
    }
    file.write_text(f"# A large study\n{json.dumps({'axes': axes, 'seeds': SEEDS})}\n")  # JSON is YAML
    wanted = load_study(str(file), "mini")
    jobs = jobs_of(wanted, wanted.cells, folder / "runs")
    like = [row for row in read_records(ROOT / "results", "sn-table2") if row["seed"] == "0"]
    like = [row for row in like if row["cell"] == like[0]["cell"] and row["scale"] == like[0]["scale"]]
    made = [
        {**row, "scale": "mini", "cell": job.name, "seed": str(job.seed), "config_hash": job.result_hash or ""}
        for job in jobs
        for row in like
    ]
    results = folder / "results"
    change_records(results, wanted.id, lambda rows: {**rows, "runs": made}, primary="top1")
    size = sum(path.stat().st_size for path in results.rglob("*.csv"))
    yield f"record: {len(jobs)} runs of {len(wanted.cells)} cells", size / len(jobs), "bytes/run"
    for words in (["reproduce", str(file), "--plan"], ["table", str(file)]):
        there = ["--results", str(results)]
        yield f"exnorm {words[0]} {' '.join(words[2:])}".strip(), seconds_of([*words, *there], folder), "s"
    began = time.perf_counter()
    change_records(results, wanted.id, lambda rows: rows, primary="top1")
    yield "adding a run to that record", time.perf_counter() - began, "s"
    shutil.copytree(ROOT / "results", folder / "own" / "results")
    shutil.copy(ROOT / "README.md", folder / "own")
    studies = len(
        {(row["scale"], name) for name in recorded(ROOT / "results") for row in read_records(ROOT / "results", name)}
    )
    yield f"exnorm results, {studies} tables", seconds_of(["results", "results"], folder / "own"), "s"


def runs(folder: Path) -> Found:
    """Folders of finished runs."""
    from exnorm.runs.folder import RunFolder
    from exnorm.runs.listing import list_runs

    tiny = ["model=resnet_mini", "data=digits", "trainer.epochs=3", "logger=off", "ops.backend=eager"]
    seconds_of(["train", *tiny], folder)
    (run,) = [path.parent for path in folder.glob("runs/*/*/record.json")]
    files = [path for path in run.rglob("*") if path.is_file()]
    yield "a finished run of 3 epochs", len(files), "files"
    without = sum(path.stat().st_size for path in files if path.suffix != ".pt")
    yield "a finished run of 3 epochs, without checkpoints", without / 1024, "KiB"
    many = folder / "many" / "digits"
    for number in range(COPIES):
        shutil.copytree(run, many / f"{run.name[:-1]}{number}", ignore=shutil.ignore_patterns("*.pt"))
    began = time.perf_counter()
    list_runs(folder / "many")
    yield "exnorm runs", 1e3 * (time.perf_counter() - began) / COPIES, "ms/run"
    began = time.perf_counter()
    for path in many.iterdir():
        assert RunFolder(path).read_record() is not None
    yield "finding that a run has finished", 1e3 * (time.perf_counter() - began) / COPIES, "ms/run"
    began = time.perf_counter()
    for path in many.iterdir():
        os.utime(path / "record.json")
    yield "a sign of life of a lock", 1e3 * (time.perf_counter() - began) / COPIES, "ms"


def jobs(folder: Path) -> Found:
    """The connections of the first process of a job to all others, which are one process here."""
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADING, str(PROCESSES)], env=importing_environment(), stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    address = leader.stdout.readline().split()
    command = [sys.executable, "-c", FOLLOWING, str(PROCESSES), *address]
    subprocess.run(command, env=importing_environment(), check=False, stderr=subprocess.DEVNULL)
    found = json.loads(leader.stdout.readline())
    leader.wait()
    yield f"{PROCESSES} processes, until all are known", found["joined_s"], "s"
    yield f"{PROCESSES} processes, from a failure until the last one is told", found["told_s"], "s"
    yield f"the leader of {PROCESSES} processes, above its imports", found["mib"], "MiB"


LEADING = """
import json, os, sys, time
from exnorm.engine import lifeline
def mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
size, before = int(sys.argv[1]), mib()
leader = lifeline.Leader(size)
print(leader.port, leader.token, flush=True)
while not leader._places:
    time.sleep(0.001)
began = time.monotonic()
assert len(leader.followers(600)) == size - 1
joined = time.monotonic() - began
memory = mib() - before
leader.send(size - 1, {"fail": True})
assert leader.cause(600)
told = time.monotonic()
while len(leader._left) < size - 1:
    time.sleep(0.001)
print(json.dumps({"joined_s": round(joined, 2), "told_s": round(time.monotonic() - told, 2), "mib": round(memory, 1)}),
      flush=True)
os._exit(0)
"""

FOLLOWING = """
import os, sys
from exnorm.engine import lifeline
from exnorm.engine.job import Place
from exnorm.runs.loader_room import allow_files
size, port, token = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
allow_files(4 * size, users="followers", advice="Use")
places = [Place(rank, size, rank % 8, str(rank // 8), "host") for rank in range(1, size)]
followers = [lifeline.Follower(place, "localhost", port, token) for place in places]
followers[-1].receive()
followers[-1].fail("for the measurement")
for follower in followers:
    follower.job_has_failed(600)
os._exit(0)
"""


def checkpoints(folder: Path) -> Found:
    """How long a checkpoint of a ResNet-50 with EN stops the training."""
    import torch

    from exnorm.config.compose import compose_train
    from exnorm.data import load
    from exnorm.engine.batch import plan_batch
    from exnorm.engine.distributed import World
    from exnorm.engine.learner import build_learner, save
    from exnorm.runs.folder import RunFolder
    from exnorm.tasks import make_task

    config = compose_train(["model=resnet50", "data=digits", "norm=en", "batch=1x8"])
    task = make_task(config.task, load(config.data).classes)
    learner = build_learner(config, plan_batch(config.batch, devices=1), World(0, 1, torch.device("cpu")), task)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()  # so that it has its state
    run = RunFolder(folder / "run")
    run.create("")
    times = []
    for learner.step in range(1, 6):
        began = time.perf_counter()
        path = save(run, learner)
        times.append(time.perf_counter() - began)
    yield "a checkpoint of ResNet-50 with EN and momentum", path.stat().st_size / 2**20, "MiB"
    yield "that checkpoint stops the training for", median(times), "s"


def seconds_of(words: list[str], folder: Path) -> float:
    """Return the seconds that an exnorm command takes, its start included."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "exnorm", *words],
        cwd=folder,
        env=importing_environment(),
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


PARTS: dict[str, Callable[[Path], Found]] = {
    "images": images,
    "study": study,
    "runs": runs,
    "jobs": jobs,
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    sys.exit(main())

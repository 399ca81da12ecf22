"""File systems without locks, containers with little shared memory, shells that allow few open files."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import CliRunner
from engine_cases import WAIT_S, environment, make_image_folder, only_run, start, start_code, tiny, wait_for, workers

from exnorm.engine.shortage import is_lost_worker, shortage
from exnorm.runs.folder import RunFolder

pytestmark = pytest.mark.slow
# What NFS without a lock daemon, and CIFS, answer: ENOLCK for flock, EINVAL for fsync of a folder.
NETWORK_DISK = """
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int flock(int handle, int operation) { errno = ENOLCK; return -1; }
int fsync(int handle) {
    struct stat facts;
    if (fstat(handle, &facts) == 0 && S_ISDIR(facts.st_mode)) { errno = EINVAL; return -1; }
    return syscall(SYS_fsync, handle);
}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_run_works_on_a_network_disk_without_locks(images: Path, tmp_path: Path, run_cli: CliRunner) -> None:
    (tmp_path / "disk.c").write_text(NETWORK_DISK)
    library = tmp_path / "disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "disk.c"], check=True)
    arguments = tiny(images, "trainer.epochs=1")
    done = run_cli(*arguments, env={"LD_PRELOAD": str(library)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (only_run(tmp_path) / "record.json").is_file()
    again = run_cli(*arguments, env={"LD_PRELOAD": str(library)})
    assert again.returncode == 0 and "has finished" in again.stdout
    listed = run_cli("runs", env={"LD_PRELOAD": str(library)})
    assert listed.returncode == 0 and "running" not in listed.stdout


def train_in_shell(shell: list[str], limit: str, images: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A training with two loader processes, in a shell that sets a limit first."""
    command = shlex.join([sys.executable, "-m", "exnorm", *tiny(images, "data.workers=2")])
    return subprocess.run(
        [*shell, f"{limit}; exec {command}"],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("shell", "limit", "said"),
    [
        (
            ["unshare", "--map-root-user", "--mount", "bash", "-c"],
            "mount -t tmpfs -o size=64k exnorm /dev/shm",
            "--shm-size",
        ),
        (["bash", "-c"], "ulimit -n 30", "too few open files"),
        (
            ["bash", "-c"],
            f"export TMPDIR=$PWD/{'long' * 25}; mkdir $TMPDIR",
            "the path of the temporary folder is too long",
        ),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(
    shell: list[str], limit: str, said: str, images: Path, tmp_path: Path
) -> None:
    done = train_in_shell(shell, f"{limit} || exit 77", images, tmp_path)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets no test mount a disk")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("exnorm: error: ") and said in last and "data.workers=0" in last
    assert "Traceback" not in done.stderr


LOST_BATCH = """
import os, tempfile, torch
from data_cases import config_of
from exnorm.data import load
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.transforms import train_transform

config = config_of("digits")
images = load(config).train
batches = TrainBatches(len(images), total=4, seed=0)
loader = Loader(SeededImages(images, train_transform(config), seed=0), batches, workers=1, device=torch.device("cpu"))
tempfile.tempdir = tempfile.mkdtemp() + "/" + "long" * 25  # so that no socket can be made there
os.mkdir(tempfile.tempdir)
next(iter(loader))
"""


def test_a_batch_that_cannot_be_handed_out_ends_the_training_instead_of_halting_it() -> None:
    """Python's queue prints a traceback and drops the batch, for which the trainer would wait for ever."""
    _, err = start_code(LOST_BATCH).communicate(timeout=WAIT_S)
    assert err.count("exnorm: a loader process cannot hand out a batch: AF_UNIX path too long") == 1
    assert "exited unexpectedly" in err.splitlines()[-1]


def test_a_low_limit_of_open_files_is_raised(images: Path, tmp_path: Path) -> None:
    done = train_in_shell(["bash", "-c"], "ulimit -S -n 30", images, tmp_path)
    assert done.returncode == 0, done.stderr


def broken_dataloader() -> RuntimeError:
    """What torch's handler of SIGCHLD does inside another call, here inside one that writes a checkpoint."""
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 1234) is killed by signal: Killed. ")
        except RuntimeError:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 471808 vs 471708")  # noqa: B904
    except RuntimeError as problem:
        return problem


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"), "a loader process ended"),
        (broken_dataloader(), "a loader process ended"),
        (OSError(errno.EIO, "", "best.pt"), "best.pt: Input/output error"),
        (OSError(errno.EROFS, ""), "runs/x: Read-only file system"),
        (OSError(errno.EACCES, "", "runs/x/log.txt"), "runs/x/log.txt: Permission denied"),
        (OSError(errno.EACCES, "", "elsewhere/x"), None),
        (ValueError("a bug"), None),
    ],
)
def test_what_a_machine_lacks_is_one_line_and_a_bug_is_not(problem: Exception, said: str | None) -> None:
    line = shortage(problem, RunFolder("runs/x"))
    assert (
        line is None
        if said is None
        else line is not None and said in line and "the same command starts" in line.lower()
    )


MEETING = """
import time
import torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


def test_a_worker_that_is_lost_before_all_have_met_is_known_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the worker that failed says why, and the others keep quiet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with start_code(MEETING) as first:
        assert first.stdout is not None
        store = dist.TCPStore("localhost", int(first.stdout.readline()), is_master=False)
        threading.Timer(0.5, first.kill).start()
        with pytest.raises(RuntimeError) as lost:
            store.wait(["address of the first"])
    assert is_lost_worker(lost.value), lost.value


def test_a_killed_loader_is_one_line_on_two_devices(images: Path, tmp_path: Path) -> None:
    """As by the kernel when memory runs out. The other worker loses its connection and adds nothing."""
    arguments = tiny(images, "data.workers=1", "batch=2x4", "trainer.devices=2", "trainer.epochs=500")
    process = start(arguments, tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/*/checkpoints/*.pt")), "a checkpoint")
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().split()[3]) for pid in workers(str(tmp_path))}
    loader = next(pid for pid, parent in parents.items() if parent in parents)
    os.kill(loader, signal.SIGKILL)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "a loader process ended (DataLoader worker" in line and "the checkpoint after step" in line

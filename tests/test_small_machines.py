"""File systems without locks, containers with little shared memory, shells that allow few open files."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CliRunner
from engine_cases import WAIT_S, environment, make_image_folder, only_run, tiny

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


def test_a_low_limit_of_open_files_is_raised(images: Path, tmp_path: Path) -> None:
    done = train_in_shell(["bash", "-c"], "ulimit -S -n 30", images, tmp_path)
    assert done.returncode == 0, done.stderr

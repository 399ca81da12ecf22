"""A disk that fills up while a run is under way: a real one, a small tmpfs in a mount namespace of its own."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from engine_cases import WAIT_S, environment, make_image_folder, tiny

pytestmark = pytest.mark.slow
UNSHARE = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
SCRIPT = """
mount -t tmpfs -o size=5m exnorm {disk} || exit 77
attempt() {{ {command} > {logs}/$1.out 2> {logs}/$1.err; echo $? > {logs}/$1.code; find {disk} > {logs}/$1.files; }}
attempt first
head -c 9m /dev/zero > {disk}/filler
attempt full
rm {disk}/filler
mount -o remount,size=100m {disk}
attempt roomy
"""


@pytest.mark.parametrize("logger", ["off", "offline"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(logger: str, tmp_path: Path) -> None:
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir(), logs.mkdir()
    images = make_image_folder(tmp_path / "images")
    arguments = tiny(images, f"runs={disk}/runs", f"logger={logger}", "trainer.checkpoint_every_steps=2")
    command = shlex.join([sys.executable, "-m", "exnorm", *arguments])
    script = SCRIPT.format(disk=disk, logs=logs, command=command)
    done = subprocess.run([*UNSHARE, script], env=environment(), cwd=tmp_path, timeout=3 * WAIT_S, check=False)
    if not (logs / "first.code").exists():
        pytest.skip("this machine lets no test mount a disk")
    assert done.returncode == 0

    def told(attempt: str) -> list[str]:
        assert (logs / f"{attempt}.code").read_text() == "2\n"
        assert ".part" not in (logs / f"{attempt}.files").read_text()
        lines = (logs / f"{attempt}.err").read_text().splitlines()
        return [line for line in lines if "W&B" not in line]

    (line,) = told("first")
    assert (
        "the disk is full" in line and "bytes and" in line and "resumes the run from the checkpoint after step" in line
    )
    (line,) = told("full")
    assert "No space left on device" in line or "the disk is full" in line
    assert (logs / "roomy.code").read_text() == "0\n", (logs / "roomy.err").read_text()
    assert "resumed after step" in (logs / "roomy.out").read_text()

"""What worker processes import and see: the packages that are installed, not what lies in the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_cases import ROOT, WAIT_S, environment, make_image_folder, start, start_code, tiny, wait_for, workers

OUTER = """
import subprocess, sys
from exnorm.runs.subprocesses import importing_environment
code = "import exnorm, my_norm; print(my_norm.answer)"
sys.exit(subprocess.run([sys.executable, "-c", code], env=importing_environment()).returncode)
"""
TRAP = "raise SystemExit('the module of the current folder was imported')\n"


def set_traps(folder: Path) -> None:
    """Files and a folder with the names of modules that torch, timm and exnorm import."""
    for name in ("dis.py", "timm/__init__.py", "omegaconf.py", "numpy/__init__.py", "random.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TRAP)


@pytest.mark.slow
def test_files_of_the_current_folder_replace_no_module_of_a_worker(tmp_path: Path) -> None:
    """Of a training and of a study, whose runs are processes of processes."""
    images = make_image_folder(tmp_path / "images", train=4)
    here = tmp_path / "here"
    here.mkdir()
    set_traps(here)
    settings = ", ".join(f'"{word}"' for word in tiny(images, "trainer.epochs=1")[1:])
    (here / "mine.yaml").write_text(
        f"# Mine\naxes: {{norm: [bn]}}\nseeds: 1\nset: [{settings}]\n".replace('"logger=off", ', "")
    )
    for arguments in (tiny(images, "trainer.epochs=1"), ["reproduce", "mine.yaml"]):
        command = [sys.executable, "-P", "-m", "exnorm", *arguments]
        done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_that_pythonpath_names_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A normalizer of one's own may lie in the current folder, where PYTHONPATH says so."""
    (tmp_path / "my_norm.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    for asked, works in ((str(ROOT), False), (f"{ROOT}{os.pathsep}.", True)):
        monkeypatch.setenv("PYTHONPATH", asked)
        done = subprocess.run([sys.executable, "-c", OUTER], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is works, done.stderr


@pytest.mark.slow
def test_deterministic_training_sets_what_cublas_reads_at_its_start(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images")
    process = start(tiny(images, "trainer.epochs=500", "trainer.deterministic=true"), tmp_path)
    (pid,) = wait_for(lambda: workers(str(tmp_path)), "the worker")
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    process.terminate()
    process.communicate(timeout=WAIT_S)
    assert b"CUBLAS_WORKSPACE_CONFIG=:4096:8" in variables


TRAINERS = """
import os, signal, sys, torch
from data_cases import config_of
from exnorm.data import load
from exnorm.data.loader import Loader, SeededImages, TrainBatches
from exnorm.data.transforms import train_transform

config = config_of("digits")
images = load(config).train
samples, batches = SeededImages(images, train_transform(config), seed=0), TrainBatches(len(images), total=4, seed=0)
trainers, (inlet, outlet) = [], os.pipe()
for _ in range(8):
    trainers.append(os.fork())
    if not trainers[-1]:
        loader = Loader(samples, batches, workers=1, device=torch.device("cpu"))
        while True:
            for number, _ in enumerate(loader):
                if number == 20:
                    os.write(outlet, b"1")
for _ in trainers:
    os.read(inlet, 1)
for trainer in trainers:
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends loader processes")
def test_loader_processes_of_a_killed_trainer_print_nothing_and_end() -> None:
    """They lose the connection to their trainer while they hand it a batch."""
    trainers = start_code(TRAINERS)
    _, err = trainers.communicate(timeout=WAIT_S)
    assert (trainers.returncode, err) == (0, "")  # stderr closes when the last loader process has ended

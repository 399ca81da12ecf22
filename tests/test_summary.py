"""What a run says at its start and end beside its numbers: what exists already, and what a user may type next."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CliRunner
from engine_cases import make_image_folder, tiny

from exnorm.engine.summary import print_result
from exnorm.runs.folder import RunFolder, write_json_atomic

RECORD = {"val/top1": 10.0, "val/top5": 50.0, "val/loss": 1.0, "hours": 1.0}


def said(output: str, beginning: str) -> str:
    """The rest of the one line that begins so."""
    (line,) = [line for line in output.splitlines() if line.startswith(beginning)]
    return line.removeprefix(beginning)


@pytest.mark.slow
def test_an_offline_run_ends_with_the_command_that_uploads_it(tmp_path: Path, run_cli: CliRunner) -> None:
    """W&B finds the run by exactly that command; once it is uploaded, nothing is said any more."""
    images = make_image_folder(tmp_path / "data")
    arguments = tiny(images, "logger.wandb=offline", "trainer.epochs=1", "runs='my runs'")
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    command = shlex.split(said(done.stdout, "to upload it to W&B: "))
    dry = subprocess.run(
        [sys.executable, "-m", *command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Would sync 1 run" in dry.stdout + dry.stderr
    (file,) = tmp_path.glob("my runs/*/*/wandb/offline-run-*/*.wandb")
    assert Path(command[-1]) == file.parent.relative_to(tmp_path)
    file.with_suffix(".wandb.synced").touch()  # as W&B marks it
    assert "to upload" not in run_cli(*arguments).stdout


@pytest.mark.slow
def test_a_run_with_more_epochs_names_the_shorter_one_that_its_weights_may_come_from(
    tmp_path: Path, cli_here: CliRunner
) -> None:
    """The longest of them; only runs that differ in nothing else; and what it offers works."""
    images = make_image_folder(tmp_path / "data")
    names = {}
    for number, more in enumerate((["trainer.epochs=1"], ["trainer.epochs=2"], ["trainer.epochs=3", "optim.lr=0.5"])):
        done = cli_here(*tiny(images, *more))
        assert done.returncode == 0, done.stderr
        names[number] = said(done.stdout, "run folder: ")
        assert ("has finished the same training" in done.stdout) == (number == 1)
    done = cli_here(*tiny(images, "trainer.epochs=4"))
    assert done.stdout.startswith(f"{names[1]} has finished the same training with trainer.epochs=2. This run starts")
    offer = done.stdout.splitlines()[0].rpartition(" ")[2]
    assert offer == f"model.init_from={names[1]}"
    started = cli_here(*tiny(images, "trainer.epochs=4", offer))
    assert started.returncode == 0 and "has finished the same" not in started.stdout
    assert said(started.stdout, "run folder: ") not in names.values()


@pytest.mark.parametrize(("count", "words"), [(1, "1 broken training image was"), (3, "3 broken training images were")])
def test_the_last_line_of_a_run_says_how_many_images_were_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, words: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    named = "".join(f"{key}: {{name: a}}\n" for key in ("model", "norm", "data"))
    folder.create(f"{named}batch: 1x8\nseed: 0\ntrainer: {{}}\n")
    write_json_atomic(folder.record_file, {**RECORD, "bad_images": count})
    print_result(folder)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(words) and last.endswith(f"data.exclude={folder.bad_images_file} leaves them out.")
    write_json_atomic(folder.record_file, {**RECORD, "bad_images": 0})
    print_result(folder)
    assert "broken" not in capsys.readouterr().out

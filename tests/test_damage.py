"""Checkpoints that cannot be read: nothing is trained over them unless the user says so."""

import os
import random
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CliRunner
from engine_cases import assert_bit_equal, checkpoints, make_image_folder, metrics, tiny, train_here

from exnorm.config.errors import UserError
from exnorm.engine import checkpoint
from exnorm.runs.folder import RunFolder


def small_state(step: int) -> dict[str, object]:
    """A state like a run's, in a few kilobytes."""
    return {"step": step, "epoch": 0, "classes": ["a", "b"], "model": {"w": torch.arange(600.0), "b": torch.ones(3)}}


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_kept_again_leaves_no_other_file(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run that was killed just after it had kept its best one."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    folder = RunFolder(tmp_path)
    best = folder.checkpoints / checkpoint.BEST
    for step in (7, 7, 8):
        path = checkpoint.save(folder, small_state(step))
        for _ in range(2):
            checkpoint.keep(path, best)
        assert checkpoint.read(best)["step"] == step
    assert {file.name for file in folder.checkpoints.iterdir()} <= {"best.pt", "step-000000007.pt", "step-000000008.pt"}


def test_every_damaged_byte_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Flipped and cut off anywhere, a checkpoint reads as it was written or is called damaged, and nothing else."""
    folder = RunFolder(tmp_path)
    path = checkpoint.save(folder, small_state(7))
    whole, wanted = path.read_bytes(), checkpoint.read(path)
    draw = random.Random(0)
    with zipfile.ZipFile(path) as archive:
        places = range(0, archive.start_dir, 5)  # all records with their headers, up to the table of contents
    damages = [whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :] for at in places]
    damages += [whole[: draw.randrange(len(whole))] for _ in range(30)] + [b""]
    found = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            assert_bit_equal(checkpoint.read(path), wanted)
        except checkpoint.Damaged:
            found += 1
    assert found > len(damages) // 2


def test_an_error_that_passes_is_no_damage(tmp_path: Path) -> None:
    """Too many open files, here: the file is left alone and read the next time."""
    path = checkpoint.save(RunFolder(tmp_path), small_state(7))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.open(path, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(UserError, match="cannot be read now") as raised:
            checkpoint.read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(raised.value, checkpoint.Damaged)
    assert checkpoint.read(path)["step"] == 7


def test_what_another_torch_wrote_is_no_damage(tmp_path: Path) -> None:
    """Here something that `weights_only=True` refuses, in a whole archive."""
    path = tmp_path / "checkpoints" / "step-000000001.pt"
    path.parent.mkdir()
    torch.save({"step": 1, "odd": Path("x")}, path)
    with pytest.raises(UserError, match="is not damaged, but torch") as raised:
        checkpoint.load_latest(RunFolder(tmp_path))
    assert not isinstance(raised.value, checkpoint.Damaged)


def test_a_new_checkpoint_survives_older_ones_with_higher_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (8, 9, 2, 3):
        checkpoint.save(folder, small_state(step))
        assert checkpoint.step_file(folder, step).is_file()
    assert len(checkpoints(tmp_path)) == checkpoint.KEPT


@pytest.mark.slow
def test_a_run_without_a_readable_checkpoint_starts_over_only_when_told(tmp_path: Path, cli_here: CliRunner) -> None:
    arguments = tiny(make_image_folder(tmp_path / "images"), "trainer.checkpoint_every_steps=2")
    run = train_here(arguments, tmp_path)
    (run / "record.json").unlink()
    before = metrics(run)
    shutil.rmtree(tmp_path / "kept", ignore_errors=True)
    shutil.copytree(run / "checkpoints", tmp_path / "kept")
    for path in checkpoints(run):
        path.write_bytes(path.read_bytes()[:-2000])
    for _ in range(2):  # the second time only renamed files are left
        done = cli_here(*arguments)
        assert done.returncode == 2
        assert "fresh=true to start over" in done.stderr.splitlines()[-1]
        assert metrics(run) == before and not checkpoints(run)
        assert len(list((run / "checkpoints").glob("*.pt.damaged"))) == 2
    for path in (tmp_path / "kept").glob("step-*.pt"):
        shutil.copy(path, run / "checkpoints")
    done = cli_here(*arguments)
    assert done.returncode == 0 and "resumed after step 12" in done.stdout, done.stderr
    (run / "record.json").unlink()
    for path in checkpoints(run):
        path.write_bytes(b"")
    assert cli_here(*arguments, "fresh=true").returncode == 0
    assert metrics(run) == before and (run / "record.json").is_file()

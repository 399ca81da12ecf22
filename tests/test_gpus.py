"""Which device a run takes is what torch can use, not what a variable or a tool promises."""

from pathlib import Path

import pytest
import torch
from conftest import CliRunner
from engine_cases import make_image_folder, tiny

from exnorm.config.errors import UserError
from exnorm.engine.processes import ask_torch_for_gpus
from exnorm.engine.worker import device_type

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
FAKE_TORCH = """
class cuda:
    device_count = staticmethod(lambda: 2)
    @staticmethod
    def init(): {init}
"""


@WITHOUT_GPU
def test_cuda_without_a_gpu_is_one_line(tmp_path: Path, run_cli: CliRunner) -> None:
    """Also where CUDA_VISIBLE_DEVICES names one; nothing is made."""
    for env in ({}, {"CUDA_VISIBLE_DEVICES": "0"}):
        done = run_cli("train", "trainer.device=cuda", "trainer.epochs=1", env=env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "trainer.device=cuda, but torch finds no GPU: " in done.stderr and "trainer.device=cpu" in done.stderr
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="torch finds no GPU"):  # under torchrun there is no controller
        device_type("cuda")


@WITHOUT_GPU
@pytest.mark.slow
def test_training_on_the_cpu_instead_of_a_gpu_is_never_silent(tmp_path: Path, run_cli: CliRunner) -> None:
    arguments = tiny(make_image_folder(tmp_path / "images"), "trainer.epochs=1")
    done = run_cli(*arguments, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "CUDA_VISIBLE_DEVICES=0" in line]
    assert "torch finds no GPU" in line and "the CPU is used" in line


def test_torch_is_asked_and_its_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-smi, as in many containers; the torch here is a fake one, the process that is asked is real."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for init, found in (
        ("pass", (2, "")),
        ("raise RuntimeError('the driver is too old\\nmore')", (0, "the driver is too old")),
    ):
        (tmp_path / "torch.py").write_text(FAKE_TORCH.format(init=init))
        assert ask_torch_for_gpus() == found


@WITHOUT_GPU
def test_the_real_torch_says_why_there_is_none() -> None:
    count, problem = ask_torch_for_gpus()
    assert count == 0 and problem

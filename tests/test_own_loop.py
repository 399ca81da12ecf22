"""`exnorm.convert` in a script of a user, which sets no back end: fast layers, one line about the compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = """
import torch, exnorm
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(2)
model = exnorm.convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)), "gn")
x = torch.randn(8, 3, 24, 24)

def step(_=None):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.double().sum().item() for p in model.parameters()]

if __name__ == "__main__":
    print(exnorm.ops.get_backend(), step())
"""
FORKED = """
    import multiprocessing
    for method in ("fork", "spawn"):  # one thread, as in torch's loaders: of torch, several hang after a fork, too
        with multiprocessing.get_context(method).Pool(1, torch.set_num_threads, (1,)) as pool:
            (there,) = pool.map_async(step, [0]).get(timeout=600)
        torch.testing.assert_close(there, step(), rtol=1e-4, atol=1e-4, msg=method)
    print("equal")
"""


def start(file: Path, text: str, **more: str) -> "subprocess.Popen[str]":
    """Start a script of a user without any choice of a back end, with a cache of its own."""
    file.write_text(text, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name != "EXNORM_BACKEND"}
    here = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(file.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, str(file)],
        cwd=file.parent,
        env=inherited | here | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """The output and the errors of a script that has to succeed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


def said(err: str) -> list[str]:
    """The lines of the errors, without torch's line about a CUDA toolkit on a machine that has no GPU."""
    return [line for line in err.splitlines() if "CUDA_HOME" not in line]


@pytest.mark.slow
def test_ones_own_loop_has_compiled_layers_and_says_once_what_takes_so_long(tmp_path: Path) -> None:
    """Two processes that compile the same at the same time agree; a later start compiles nothing and says nothing."""
    both = [start(tmp_path / f"{name}.py", SCRIPT) for name in ("one", "two")]
    first, second = (ended(process) for process in both)
    assert first[0] == second[0] and first[0].startswith("compiled [")
    for _, err in (first, second):
        (line,) = said(err)
        assert line.startswith("exnorm: compiling the layers") and "EXNORM_BACKEND=eager" in line
    out, err = ended(start(tmp_path / "three.py", SCRIPT + FORKED))
    assert out == first[0] + "equal\n" and said(err) == []


def test_a_variable_chooses_the_back_end_of_ones_own_loop(tmp_path: Path) -> None:
    out, err = ended(start(tmp_path / "eager.py", SCRIPT, EXNORM_BACKEND="eager"))
    assert out.startswith("eager [") and err == "" and not (tmp_path / "cache").exists()
    wrong = start(tmp_path / "wrong.py", SCRIPT, EXNORM_BACKEND="fast")
    _, err = wrong.communicate(timeout=600)
    assert wrong.returncode == 1 and "unknown back end 'fast'; allowed: auto, eager," in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("(EXNORM_BACKEND=auto)")


def test_the_doctor_compiles_nothing(tmp_path: Path) -> None:
    """It runs every normalizer, which would take minutes the first time."""
    text = "import sys; from exnorm.cli import main; sys.argv[1:] = ['doctor']; main()"
    out, err = ended(start(tmp_path / "doctor.py", text))
    assert "run forward and backward" in out and "compiling" not in out + err

"""Warnings that every process would repeat are one line with their number; all others are printed as before."""

import io
import multiprocessing
import subprocess
import sys
import warnings

import pytest
import torch
from data_cases import odd_exif
from PIL import Image

from exnorm.runs.counted_warnings import counted_warnings


def open_three() -> None:
    """What a loader process does."""
    for _ in range(3):
        Image.open(io.BytesIO(odd_exif())).convert("RGB")


def test_warnings_of_pillow_in_all_processes_are_one_line_with_their_number(capfd: pytest.CaptureFixture[str]) -> None:
    with counted_warnings():
        loaders = [multiprocessing.get_context("fork").Process(target=open_three) for _ in range(2)]
        for loader in loaders:
            loader.start()
        for loader in loaders:
            loader.join()
        open_three()
    out, err = capfd.readouterr()
    assert out.startswith("Pillow warned 9 times, first: Corrupt EXIF data") and out.count("\n") == 1
    assert "EXIF" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_torch_warns_of_where_no_gpu_is_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with counted_warnings():
        for _ in range(2):
            torch.amp.GradScaler("cuda")
    assert capfd.readouterr().out.startswith("CUDA warned 2 times, first: torch.cuda.amp.GradScaler is enabled, but")
    with counted_warnings(printed=False):
        torch.amp.GradScaler("cuda")
    assert capfd.readouterr().out == ""


def test_other_warnings_are_printed_and_silence_is_no_line() -> None:
    code = (
        "import warnings; from exnorm.runs.counted_warnings import counted_warnings\n"
        "with counted_warnings(): warnings.warn('something else')\n"
        "warnings.warn('CUDA afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "UserWarning: something else" in done.stderr
    assert "UserWarning: CUDA afterwards" in done.stderr


def test_an_error_inside_leaves_the_warnings_as_they_were() -> None:
    before = warnings.showwarning
    with pytest.raises(KeyError), counted_warnings():
        raise KeyError
    assert warnings.showwarning is before

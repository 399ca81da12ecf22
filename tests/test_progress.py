"""What a person sees of a run: a bar on a terminal, a line a minute where there is none, and a whole table."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import classification

from exnorm.config.metrics import metrics_of
from exnorm.engine.progress import Progress
from exnorm.engine.schedule import Schedule
from exnorm.engine.summary import print_evaluations
from exnorm.runs.output import outlive_output

SUMS = torch.tensor([8.0, 3.0, 4.0, 4.0, 0, 0, 0])  # loss, top-1, top-5, images, and three of noisy labels


@pytest.fixture
def after_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Progress]:
    """Return `after_steps(count, of=..., active=True)`: the progress after `count` steps of 20 seconds each."""

    def build(count: int, *, of: int, active: bool = True) -> Progress:
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        progress = Progress(tmp_path / "log.txt", classification(classes=10), Schedule(of, -(-of // 2)), active=active)
        for step in range(1, count + 1):
            monkeypatch.setattr(time, "monotonic", lambda now=20.0 * step: now)
            progress.step(step, 0, SUMS)
        return progress

    return build


def test_a_log_file_gets_a_line_a_minute(
    after_steps: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of seven steps of 20 s the third and the sixth speak, on stderr alone; other workers do not."""
    after_steps(7, of=100, active=False)
    assert capsys.readouterr().err == ""
    log = after_steps(7, of=100).log_file
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "epoch 1/2, step 3/100: train loss 2.000, 32 min left",
        "epoch 1/2, step 6/100: train loss 2.000, 31 min left",
    ]
    assert not out and not log.exists()


def read_all(terminal: int) -> str:
    """What was written to a terminal whose other side is closed; it comes in parts."""
    parts = []
    with contextlib.suppress(OSError):  # the end
        while part := os.read(terminal, 10_000):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_bar_that_makes_room_for_lines(
    after_steps: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bar starts at the beginning of the line, which it clears; nothing of it stays before a line."""
    main, side = pty.openpty()
    with os.fdopen(side, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        after_steps(2, of=4).say("a line")
    shown = read_all(main)
    clear = "\r\033[K"
    assert shown.startswith(clear) and shown.endswith(clear)
    assert shown.split(clear)[1:-1] == [
        "[######..................] epoch 1/2, step 1/4: train loss 2.000",
        "[############............] epoch 1/2, step 2/4: train loss 2.000, 40 s left",
    ]


@pytest.mark.parametrize("columns", [20, 60, 75])
def test_a_bar_is_never_wider_than_its_terminal(
    after_steps: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """What is wrapped stays on the screen, a line for each half second."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(side, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        after_steps(3, of=4000)
    shown = read_all(main)
    bars = shown.split("\r\033[K")[1:]
    assert len(bars) == 3 and max(map(len, bars)) < columns
    assert all("epoch 1/2, step" in bar for bar in bars)


def test_a_bar_ends_with_its_terminal(after_steps: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when ssh ends between two steps: the training lives on until the signal, and then saves."""
    main, side = pty.openpty()
    with os.fdopen(side, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        outlive_output()
        progress = after_steps(1, of=4)
        os.close(main)
        monkeypatch.setattr(time, "monotonic", lambda: 40.0)
        progress.step(2, 0, SUMS)
        assert progress.last_shown == 40.0
        progress.say("a line")
    assert progress.log_file.read_text() == "a line\n"


def test_a_table_in_a_pipe_is_as_wide_as_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = "runs/imagenet/" + "x" * 150 + ".pt"
    scores = {"val/top1": 90.0, "val/top5": 99.0, "val/loss": 0.5}
    where = {"images": 50_000, "step": 3, "inference": "moving_average", "data": "imagenet", "checkpoint": checkpoint}
    print_evaluations([scores | where], metrics_of({}))
    assert f"{checkpoint} (step 3)" in capsys.readouterr().out

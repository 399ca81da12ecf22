"""One case of the campaign: a command on tiny data in a folder of its own, and the same command without a fault."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from faults import processes

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).resolve().parent / "hook"
COMMANDS = ("train", "eval", "reproduce")
HANG_S = 400.0  # a command that takes longer hangs; undisturbed, it takes up to a minute on a busy machine
STUDY = """# Tiny networks on three colours
axes:
  norm: {{bn: [norm=bn], en: [norm=en]}}
  inference: {{moving: [], batches: ["eval:inference=batch_average", "eval:calibration_batches=2"]}}
set:
{settings}
seeds: 1
"""


class FellShort(Exception):
    """A promise was broken; the message says which one and how."""


class Missed(Exception):
    """The command ended before the fault could happen, so nothing was tested."""


@dataclass
class End:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr without warnings of exnorm."""
        return [line for line in self.err.splitlines() if line.strip() and "exnorm: warning: " not in line]


@dataclass
class Case:
    """A command in a folder.

    Args:
        folder: gets `data/`, `here/` (the command's working folder), `tmp/` and what the command prints.
        reference: the folder of the same command without a fault.
    """

    folder: Path
    command: str
    processes: int
    draw: random.Random
    reference: Path | None = None
    logger: str = "off"
    detail: str = ""  # what was done, for the log
    attempts: int = 0
    running: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def here(self) -> Path:
        """The working folder of the command."""
        return self.folder / "here"

    @property
    def data(self) -> Path:
        """The images."""
        return self.folder / "data"

    @property
    def short_tmp(self) -> Path:
        """A link to `tmp/` with a short path, because sockets have their place there."""
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()
        return Path(tempfile.gettempdir()) / f"exnorm-fault-{digest[:8]}"

    @property
    def mark(self) -> str:
        """What the environment of each process of this case has."""
        return str(self.folder)

    @property
    def seconds(self) -> float:
        """How long the command takes without a fault."""
        assert self.reference is not None
        return float((self.reference / "seconds").read_text())

    def runs(self) -> list[Path]:
        """Return the run folders."""
        return sorted(path for path in self.here.glob("runs/*/*") if (path / "checkpoints").is_dir())

    def progress(self) -> int:
        """Return the steps in the last checkpoints of all runs."""
        steps = [[int(path.stem[5:]) for path in run.glob("checkpoints/step-*.pt")] for run in self.runs()]
        return sum(max(found, default=0) for found in steps)

    def arguments(self) -> list[str]:
        """Return the command."""
        if self.command == "train":
            return ["train", *settings(self.data, self.processes, self.logger), "norm=en"]
        if self.command == "eval":
            (run,) = self.runs()
            words = [f"data.root={self.data}", f"devices={self.processes}", "data.workers=1", "data.cache=false"]
            return ["eval", str(run.relative_to(self.here)), *words]
        lines = "\n".join(f'  - "{word}"' for word in settings(self.data, self.processes, self.logger))
        study = self.folder / "tiny.yaml"
        study.write_text(STUDY.format(settings=lines), encoding="utf-8")
        return ["reproduce", str(study), "--jobs", "2"]

    def environment(self) -> dict[str, str]:
        """Return the environment of the command: this checkout first, one thread so that sums have one order."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {processes.MARK: self.mark, "TMPDIR": str(self.short_tmp), "PYTHONPATH": path}
        return os.environ | own | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def start(self, *, shell: Sequence[str] = (), env: Mapping[str, str | None] | None = None) -> None:
        """Start the command and return at once.

        Args:
            shell: words in front of the command, which then is the last argument of a shell, `exec` included.
            env: changed variables; None removes one.
        """
        command = [sys.executable, "-m", "exnorm", *self.arguments()]
        environment: dict[str, str | None] = {**self.environment(), **(env or {})}
        self.attempts += 1
        with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
            process = subprocess.Popen(
                [*shell, *command],
                cwd=self.here,
                env={key: value for key, value in environment.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.running.append(process)

    def end(self, number: int = -1, *, timeout_s: float = HANG_S) -> End:
        """Wait for the end of a started command, by default the last one."""
        process = self.running[number]
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FellShort(f"attempt {self.attempts} hangs: it has not ended after {timeout_s:.0f} s") from None
        attempt = number + 1 if number >= 0 else self.attempts + number + 1
        texts = [self._log(name, attempt).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        return End(code, *texts)

    def run(self, *, shell: Sequence[str] = (), env: Mapping[str, str | None] | None = None) -> End:
        """Run the command to its end."""
        self.start(shell=shell, env=env)
        return self.end()

    def ended(self) -> bool:
        """Return whether the last started command has ended."""
        return self.running[-1].poll() is not None

    def wait_for_moment(self, *, with_checkpoint: bool = False) -> None:
        """Wait for a random moment: a time, or a number of steps and then a short time.

        Raises:
            Missed: the command ended well before.
            FellShort: it failed.
        """
        assert self.reference is not None
        by_time = self.command == "eval" or (not with_checkpoint and self.draw.random() < 0.4)
        steps = int((self.reference / "progress").read_text())
        wait_s = self.draw.uniform(0, 0.6 * self.seconds if by_time else 0.5)
        wanted = 0 if by_time else self.draw.randrange(1, steps)
        self.detail += f"after {wait_s:.2f} s" + (f" from step {wanted}" if wanted else "")
        processes.wait_until(lambda: self.ended() or self.progress() >= wanted, HANG_S)
        processes.wait_until(self.ended, wait_s)
        if self.ended():
            if (end := self.end()).code:
                raise FellShort(f"ended with code {end.code} before the fault: {end.lines[-1] if end.lines else ''}")
            raise Missed("the command ended before the fault")

    def kill(self) -> None:
        """SIGKILL to all processes of the command at once."""
        processes.kill_all(self.mark)
        for process in self.running:
            process.wait()

    def clean_up(self) -> None:
        """End what is left of the command, and unmount what was mounted in the folder."""
        self.kill()
        unmount_below(self.folder)
        self.short_tmp.unlink(missing_ok=True)

    def _log(self, name: str, attempt: int | None = None) -> Path:
        return self.folder / f"{self.attempts if attempt is None else attempt}.{name}"


def settings(data: Path, devices: int, logger: str) -> list[str]:
    """Return the settings of a training of seconds, with a checkpoint after every second step."""
    return [
        "model=resnet18",
        "model.name=test_resnet",
        "data=imagefolder",
        f"data.root={data}",
        "data.image_size=32",
        "data.resize=32",
        "data.workers=1",
        "data.cache=false",  # else images that change after the start are not read again
        f"logger={logger}",
        "trainer.epochs=3",
        "trainer.checkpoint_every_steps=2",
        f"trainer.devices={devices}",
        "trainer.device=cpu",
        "batch=2x4",
        "ops.backend=eager",
    ]


def make_images(root: Path, *, train: int = 16, val: int = 7) -> None:
    """Write train/<class>/ and val/<class>/ with small PNG images of noise around a colour of the class."""
    draw = random.Random(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("cat", "dog", "elk")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                colours = [draw.randrange(160) + 90 * (at % 3 == label) for at in range(3 * 20 * 18)]
                Image.frombytes("RGB", (20, 18), bytes(colours)).save(folder / f"{index}.png")


def make_case(folder: Path, command: str, count: int, draw: random.Random, references: Path) -> Case:
    """Return a new case with its data, its reference, and for `eval` a trained run."""
    reference = reference_of(command, count, references)
    case = Case(folder, command, count, draw, reference)
    _fill(case, references)
    return case


def reference_of(command: str, count: int, references: Path) -> Path:
    """Return the folder of an undisturbed command; run it if no earlier campaign did."""
    folder = references / f"{command}-{count}"
    if not (folder / "seconds").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        case = Case(folder, command, count, random.Random(0))
        _fill(case, references)
        began = time.monotonic()
        end = case.run(env=file_fault(case, "-m", 0, "count"))
        if end.code:
            raise SystemExit(f"the undisturbed {command} failed: {end.err}")
        (folder / "progress").write_text(str(case.progress()))
        (folder / "seconds").write_text(str(time.monotonic() - began))  # the last file: it is complete
        case.clean_up()
    return folder


def file_fault(case: Case, role: str, number: int, action: str) -> dict[str, str]:
    """Return the variables with which `hook/sitecustomize.py` acts at a file operation of the command."""
    path = os.pathsep.join([str(HOOK), case.environment()["PYTHONPATH"]])
    note = str(case.folder / "fault")
    return {"FAULT_FILES": f"{role} {number} {action} {case.here}", "FAULT_NOTE": note, "PYTHONPATH": path}


def unmount_below(folder: Path) -> None:
    """Unmount everything that is mounted in a folder, the last mount first."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in reversed(mounted):
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", path], check=False)


def _fill(case: Case, references: Path) -> None:
    for name in ("here", "tmp"):
        (case.folder / name).mkdir(parents=True)
    case.short_tmp.unlink(missing_ok=True)
    case.short_tmp.symlink_to(case.folder / "tmp")
    if not (references / "data").is_dir():
        make_images(references / "part")
        (references / "part").rename(references / "data")
    shutil.copytree(references / "data", case.data)
    if case.command == "eval":
        trained = reference_of("train", case.processes, references)
        shutil.copytree(trained / "here" / "runs", case.here / "runs")

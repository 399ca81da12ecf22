"""Faults of disks and files: full and read-only disks, damaged checkpoints, metrics and configurations."""

import errno
import shutil
import subprocess
from pathlib import Path

from faults import check, processes
from faults.cases import HANG_S, Case, FellShort, Missed
from faults.kinds import BIT_EQUAL, ONE_LINE, kind
from faults.signals import at_file_operation, restart

DAMAGES = ("truncated", "zeroed", "bit-flipped")


@kind("disk full", needs_root=True)
def disk_full(case: Case) -> str:
    """A disk of a random size, from one that is full at once to one that is full at the last write."""
    assert case.reference is not None
    there, most = bytes_of(case.here), bytes_of(case.reference / "here")
    spare = (1 << 18) if case.command == "eval" else largest_file(case.reference / "here")
    size = there + int(case.draw.uniform(0, 1.1) * (most + spare - there))
    mount_disk(case, f"size={size}")
    case.detail += f"{size} bytes, {there} of them used"
    end = case.run()
    if end.code:
        check.one_line(end)
    parts = [path.name for path in case.here.rglob("*.part")]
    if parts:
        raise FellShort(f"an incomplete file stays on the full disk: {parts[0]}")
    mount(f"-o remount,size={1 << 30}", case.here)
    return restart(case)


@kind("error at a file operation", commands=("train", "reproduce"))
def error_at_file_operation(case: Case) -> str:
    """A full or broken disk at a random open, rename or remove of a controller or worker."""
    return at_file_operation(case, errno.errorcode[case.draw.choice([errno.ENOSPC, errno.EIO])])


@kind("read-only run folder", needs_root=True)
def read_only(case: Case) -> str:
    """The runs turn read-only at a random moment, or before the start."""
    runs = case.here / "runs"
    runs.mkdir(exist_ok=True)
    if case.draw.random() < 0.3:
        mount("--bind", runs, runs), mount("-o remount,ro,bind", runs)
        case.detail += "before the start"
        case.start()
    else:
        case.start()
        case.wait_for_moment()
        mount("--bind", runs, runs), mount("-o remount,ro,bind", runs)
    end = case.end()
    if end.code:
        check.one_line(end)
    subprocess.run(["umount", "--lazy", runs], check=True)
    return restart(case)


@kind("damaged checkpoint")
def damage_last(case: Case) -> str:
    """The last checkpoint of a killed run, or of the run to evaluate, is truncated, zeroed or bit-flipped."""
    return damage_checkpoints(case, everything=False)


@kind("all checkpoints damaged")
def damage_all(case: Case) -> str:
    """All checkpoints of a run are truncated, zeroed or bit-flipped."""
    return damage_checkpoints(case, everything=True)


def damage_checkpoints(case: Case, *, everything: bool) -> str:
    """Damage checkpoints; the command uses an earlier one or refuses. Put the copies back where it refuses."""
    if case.command != "eval":
        kill_after_checkpoint(case)
    run = case.draw.choice([run for run in unfinished(case) if check.steps_of(run)])
    saved = case.folder / "saved"
    shutil.copytree(run / "checkpoints", saved)
    found = sorted((run / "checkpoints").glob("step-*.pt"))
    damaged = found if everything else found[-1:]
    for path in damaged:
        damage(path, case)
    before = check.Before(case, damaged=damaged)
    rows = evaluations(run)
    end = case.run()
    if end.code == 0 and case.command != "eval":
        before.check_resumed()
        if len(damaged) == len(found) and "bit-flipped" not in case.detail:
            raise FellShort("the run continued although no checkpoint could be read")
        return BIT_EQUAL
    if end.code:
        line = check.one_line(end)
        case.detail += f"; {line[:160]}"
        if len(damaged) < len(found):
            raise FellShort(f"refused although an earlier checkpoint is intact: {line}")
    elif case.draw and "the one before it is used" not in end.err and len(damaged) < len(found):
        case.detail += "; the damage did no harm"
    for path in (run / "checkpoints").glob("*"):
        path.unlink()
    shutil.copytree(saved, run / "checkpoints", dirs_exist_ok=True)
    if case.command == "eval":  # of another checkpoint, as the warning said
        keep_evaluations(run, rows)
    restart(case)
    return ONE_LINE


@kind("metrics.jsonl cut", commands=("train", "reproduce"))
def cut_metrics(case: Case) -> str:
    """The last line of metrics.jsonl of a killed run has lost its end, as after a power cut."""
    kill_after_checkpoint(case, with_row=True)
    runs = with_rows(case)
    if not runs:
        raise Missed("each run with a row had ended")
    file = case.draw.choice(runs) / "metrics.jsonl"
    saved = file.read_bytes()
    length = len(saved.splitlines(keepends=True)[-1])
    cut = case.draw.randrange(1, length + 1)
    file.write_bytes(saved[:-cut])
    case.detail += f"; {cut} of {length} bytes"
    before = check.Before(case)
    end = case.run()
    if end.code:
        case.detail += f"; {check.one_line(end)[:160]}"
        file.write_bytes(saved)
        restart(case)
        return ONE_LINE
    before.check_resumed()
    return BIT_EQUAL


@kind("config.yaml edited or gone")
def change_config(case: Case) -> str:
    """config.yaml of a killed run, or of the run to evaluate, is cut, empty, edited or removed."""
    if case.command != "eval":
        kill_after_checkpoint(case)
    file = case.draw.choice(unfinished(case)) / "config.yaml"
    saved = file.read_bytes()
    how = case.draw.choice(["cut", "empty", "edited", "removed"])
    case.detail += f"; {how}"
    change(file, how, case)
    rows = evaluations(file.parent)
    end = case.run()
    if end.code == 0:
        if case.command == "eval" and how != "edited":
            raise FellShort(f"evaluated although config.yaml is {how}")
        file.write_bytes(saved) if case.command == "eval" else None
        return BIT_EQUAL
    case.detail += f"; {check.one_line(end)[:160]}"
    file.write_bytes(saved)
    if evaluations(file.parent) != rows:
        raise FellShort("a refused evaluation left a row")
    restart(case)
    return ONE_LINE


@kind("config.yaml gone during the run")
def lose_config(case: Case) -> str:
    """config.yaml vanishes at a random moment."""
    case.start()
    case.wait_for_moment()
    file = case.draw.choice([*case.runs(), None])
    if file is None or not (file / "config.yaml").is_file():
        raise Missed("there was no config.yaml yet")
    saved = (file / "config.yaml").read_bytes()
    (file / "config.yaml").unlink()
    end = case.end()
    if end.code:
        check.one_line(end)
    if case.command == "eval":
        (file / "config.yaml").write_bytes(saved)
        if end.code == 0:
            return BIT_EQUAL
    return restart(case)


def kill_after_checkpoint(case: Case, *, with_row: bool = False) -> None:
    """Start the command and kill it at a random moment after its first checkpoint or its first row of metrics."""
    case.start()
    case.wait_for_moment(with_checkpoint=True)
    if with_row:
        processes.wait_until(lambda: case.ended() or with_rows(case), HANG_S)
    case.kill()
    check.nothing_left(case)
    if not any(check.steps_of(run) for run in unfinished(case)):
        raise Missed("each run with a checkpoint had ended")


def with_rows(case: Case) -> list[Path]:
    """Return the unfinished runs that have a row of metrics."""
    files = {run: run / "metrics.jsonl" for run in unfinished(case)}
    return [run for run, file in files.items() if file.is_file() and file.stat().st_size]


def unfinished(case: Case) -> list[Path]:
    """Return the runs without a record; for `eval` all runs."""
    return [run for run in case.runs() if case.command == "eval" or not (run / "record.json").is_file()]


def damage(path: Path, case: Case) -> None:
    """Damage a file in a random way, in its place: best.pt may be another name of it."""
    how, data = case.draw.choice(DAMAGES), bytearray(path.read_bytes())
    at = case.draw.randrange(len(data))
    case.detail += f"; {path.name} {how} at {at}"
    if how == "truncated":
        data = data[:at]
    elif how == "zeroed":
        data[at:] = bytes(len(data) - at)
    else:
        data[at] ^= 1 << case.draw.randrange(8)
    path.write_bytes(data)


def change(file: Path, how: str, case: Case) -> None:
    """Change a configuration."""
    data = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "edited":
        file.write_bytes(data.replace(b"epochs: 3", b"epochs: 4"))
    else:
        file.write_bytes(data[: case.draw.randrange(1, len(data)) if how == "cut" else 0])


def evaluations(run: Path) -> list[str]:
    """Return the lines of evaluations.jsonl."""
    file = run / "evaluations.jsonl"
    return file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []


def keep_evaluations(run: Path, rows: list[str]) -> None:
    """Undo evaluations."""
    if rows:
        (run / "evaluations.jsonl").write_text("".join(rows), encoding="utf-8")
    else:
        (run / "evaluations.jsonl").unlink(missing_ok=True)


def mount_disk(case: Case, options: str) -> None:
    """Move the working folder of a case to a disk of its own."""
    apart = case.folder / "apart"
    case.here.rename(apart)
    case.here.mkdir()
    mount(f"-t tmpfs -o {options} exnorm", case.here)
    for path in apart.iterdir():
        shutil.copytree(path, case.here / path.name)


def mount(words: str, *paths: Path) -> None:
    """Call mount, which may have to wait until nobody writes."""
    done: list[str] = []

    def mounted() -> bool:
        result = subprocess.run(["mount", *words.split(), *paths], capture_output=True, text=True, check=False)
        done.append(result.stderr)
        return result.returncode == 0

    if not processes.wait_until(mounted, 5):
        raise Missed(f"mount failed: {done[-1].strip()}")


def bytes_of(folder: Path) -> int:
    """Return the size of all files in pages, each counted once."""
    files = {(stat.st_ino): stat.st_size for stat in (path.stat() for path in folder.rglob("*") if path.is_file())}
    return sum(-(-size // 4096) * 4096 for size in files.values())


def largest_file(folder: Path) -> int:
    """Return the size of the largest file."""
    return max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)

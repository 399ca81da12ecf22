"""Faults of what surrounds a run: little shared memory, few open files, changing data, a W&B that hangs."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from faults import check, processes
from faults.cases import HANG_S, Case, FellShort, Missed
from faults.kinds import BIT_EQUAL, ONE_LINE, kind
from faults.signals import kill_one, restart


@kind("small or full /dev/shm", needs_root=True)
def shared_memory(case: Case) -> str:
    """A /dev/shm of a few kilobytes, or one that fills up during the run."""
    if case.draw.random() < 0.5:
        size = int(4096 * 2 ** case.draw.uniform(0, 8))
        script = f"mount -t tmpfs -o size={size} exnorm /dev/shm"
        case.detail += f"{size} bytes"
    else:
        wait_s = case.draw.uniform(0, case.seconds)
        filler = f"(sleep {wait_s}; head -c 9m /dev/zero > /dev/shm/filler 2> /dev/null) &"
        script = f"mount -t tmpfs -o size=4m exnorm /dev/shm; {filler}"
        case.detail += f"full after {wait_s:.1f} s"
    end = case.run(shell=["unshare", "--mount", "bash", "-c", f'{script}\nexec "$@"', "bash"])
    if end.code:
        case.detail += f"; {check.one_line(end)[:160]}"
    processes.left_behind(case.mark)  # the shell that fills it
    processes.kill_all(case.mark)
    return restart(case)


@kind("few open files")
def few_files(case: Case) -> str:
    """A hard limit of open files, from one with which Python only just starts."""
    limit = case.draw.randrange(16, 80)
    case.detail += f"{limit}"
    end = case.run(shell=["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash"])
    if end.code:
        case.detail += f"; {check.one_line(end)[:160]}"
    return restart(case)


@kind("data vanish")
def data_vanish(case: Case) -> str:
    """The folder of the images, or some of the images, are gone from a random moment on."""
    away = case.folder / "away"
    case.start()
    case.wait_for_moment()
    if case.draw.random() < 0.5:
        case.detail += "; all"
        case.data.rename(away)
    else:
        shutil.copytree(case.data, away)
        images = sorted(case.data.rglob("*.png"))
        for path in case.draw.sample(images, case.draw.randrange(1, len(images) // 2)):
            path.unlink()
    return with_data_back(case, away)


@kind("data unreadable")
def data_unreadable(case: Case) -> str:
    """Some images turn into noise, an empty file or a cut file at a random moment."""

    def spoil(images: list[Path], away: Path) -> None:
        for path in case.draw.sample(images, case.draw.randrange(1, 10)):
            data = path.read_bytes()
            path.write_bytes(case.draw.choice([b"", data[: len(data) // 2], b"<html>" * 40, data[:60] + bytes(400)]))

    return with_changed_images(case, spoil)


@kind("data replaced", commands=("train", "reproduce"))
def data_replaced(case: Case) -> str:
    """Some images are other images from a random moment after the first step on.

    These images have equal sizes, but in a study they do not: a run that begins later cannot notice an equal size.
    """
    more = b"\0" if case.command == "reproduce" else b""

    def replace(images: list[Path], away: Path) -> None:
        for path in case.draw.sample(images, 10):
            path.write_bytes(case.draw.choice(sorted(away.rglob("*.png"))).read_bytes() + more)

    return with_changed_images(case, replace, after_step=True)


def with_changed_images(case: Case, change: Callable[[list[Path], Path], None], *, after_step: bool = False) -> str:
    """Let `change` change some of the images at a random moment; it also gets a folder with copies of them."""
    away = case.folder / "away"
    shutil.copytree(case.data, away)
    case.start()
    case.wait_for_moment(with_checkpoint=after_step)
    change(sorted(case.data.rglob("*.png")), away)
    return with_data_back(case, away, may_miss=not after_step)


def with_data_back(case: Case, away: Path, *, may_miss: bool = True) -> str:
    """Wait for the end with changed data, restore them and go on.

    Raises:
        Missed: the data had changed before a run (if `may_miss`) or the evaluation was named after them. So it is that
            of other data.
    """
    end = case.end()
    if end.code:
        case.detail += f"; {check.one_line(end)[:160]}"
    shutil.rmtree(case.data, ignore_errors=True)
    away.rename(case.data)
    assert case.reference is not None
    late = Missed("the data had changed before they were listed")
    if may_miss and ids_of(case.here) - ids_of(case.reference / "here"):
        raise late
    if check.drop_other_data(case) and case.command == "eval":  # a study goes on with the data of before
        raise late
    if end.code == 0:
        check.nothing_left(case)
        return BIT_EQUAL
    restart(case)
    return ONE_LINE


def ids_of(folder: Path) -> set[str]:
    """Return the fingerprints of the data in the names of the runs."""
    return {str(json.loads(file.read_text())["data_id"]) for file in folder.glob("runs/*/*/provenance.json")}


@kind("W&B's service dies", commands=("train",), logger="offline")
def kill_service(case: Case) -> str:
    """SIGKILL of the service of W&B at a random moment; the run continues without it."""
    return kill_one(case, "service")


@kind("W&B hangs", commands=("train",), logger="offline")
def stop_service(case: Case) -> str:
    """The service of W&B answers no more, from a random moment on (SIGSTOP)."""
    case.start()
    case.wait_for_moment()
    service = [pid for pid, role in processes.alive(case.mark).items() if role == "service"]
    if not service:
        raise Missed("the service did not run at that moment")
    processes.kill(service, signal.SIGSTOP)
    end = case.end(timeout_s=HANG_S)
    if end.code:
        raise FellShort(f"the run ended with code {end.code} because W&B hangs: {end.lines[-1]}")
    if "Traceback" in end.err:
        raise FellShort(f"a traceback: {end.lines[-1]}")
    check.nothing_left(case)
    return BIT_EQUAL


@kind("W&B without a home folder", commands=("train",), logger="offline")
def no_home(case: Case) -> str:
    """HOME is not set, does not exist, or is a file."""
    file = case.folder / "file"
    file.write_text("")
    home = case.draw.choice([None, "/nonexistent/home", str(file)])
    case.detail += f"HOME={home}"
    caches = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"))
    end = case.run(env={"HOME": home, **caches})
    if end.code:
        raise FellShort(f"ended with code {end.code}: {end.lines[-1]}")
    if "Traceback" in end.err:
        raise FellShort(f"a traceback: {end.lines[-1]}")
    check.nothing_left(case)
    return BIT_EQUAL

"""Faults from inside a Python process: Python imports this file at its start, if PYTHONPATH has this folder.

FAULT_CLOCK="AFTER_S BACK_S" sets the clock back by BACK_S seconds, AFTER_S seconds after the start of each process. It
replaces `time.time`, `time.time_ns` and the `datetime.now` from which exnorm takes its times. The times of files and of
C code stay as they are.

FAULT_FILES="ROLE N ACTION FOLDER" acts at the N-th file operation (open, rename, remove, mkdir, link, truncate) below
FOLDER in processes whose command line has ROLE. ACTION is kill, or the name of an error such as ENOSPC. Writes are no
audit events of Python, so a fault falls between an open and a rename, not inside one write. FAULT_NOTE is a file that
tells when the fault happened. With ACTION=count, the number of operations is appended to it when the process ends.
"""

import atexit
import datetime
import errno
import os
import signal
import sys
import time

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate"}


def set_clock_back(after_s: float, back_s: float) -> None:
    """Replace the functions that tell the time of day."""
    from exnorm.runs import folder

    began, clock, clock_ns = time.monotonic(), time.time, time.time_ns
    original = datetime.datetime

    def back() -> float:
        return back_s if time.monotonic() - began >= after_s else 0.0

    class Shifted(original):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return original.now(tz) - datetime.timedelta(seconds=back())

    time.time = lambda: clock() - back()
    time.time_ns = lambda: clock_ns() - int(back() * 1e9)
    folder.datetime = Shifted  # not in the module `datetime`: pandas' C code crashes with another class there


def fail_at(number: int, action: str, folder: str, note: str) -> None:
    """Count file operations below a folder, and act at one of them."""
    count, busy = 0, False

    def tell(text: str) -> None:
        nonlocal busy
        busy = True
        with open(note, "a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in EVENTS or busy or not isinstance(arguments[0], str | bytes):
            return
        path = os.fsdecode(arguments[0])
        if not os.path.abspath(path).startswith(folder):
            return
        count += 1
        if count == number and action != "count":
            tell(f"{event} {path}")
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            code = getattr(errno, action)
            raise OSError(code, os.strerror(code), path)

    if action == "count":
        atexit.register(lambda: tell(str(count)))
    sys.addaudithook(hook)


def main() -> None:
    """Do what the environment asks for."""
    if "FAULT_CLOCK" in os.environ:
        after_s, back_s = os.environ["FAULT_CLOCK"].split()
        set_clock_back(float(after_s), float(back_s))
    if "FAULT_FILES" in os.environ:
        role, number, action, folder = os.environ["FAULT_FILES"].split(maxsplit=3)
        if role in " ".join(sys.orig_argv):
            fail_at(int(number), action, folder, os.environ["FAULT_NOTE"])


main()

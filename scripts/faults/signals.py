"""Faults by signals: killed processes, SIGTERM, Ctrl-C twice; two starts at once; a clock that is set back."""

import os
import signal

from faults import check, processes
from faults.cases import HOOK, Case, FellShort, Missed, file_fault
from faults.kinds import BIT_EQUAL, kind


def restart(case: Case, before: check.Before | None = None) -> str:
    """Start the command again; it must resume and end well."""
    check.nothing_left(case)
    before = before or check.Before(case)
    end = case.run()
    if end.code:
        raise FellShort(f"the restart ended with code {end.code}: {end.lines[-1] if end.lines else ''}")
    if "Traceback" in end.err:
        raise FellShort(f"the restart printed a traceback: {end.lines[-1]}")
    before.check_resumed()
    if case.command == "eval":  # the first attempt may have written its row before the fault
        check.once(case.runs()[0] / "evaluations.jsonl")
    return BIT_EQUAL


def kill_one(case: Case, *roles: str) -> str:
    """SIGKILL one random process of some roles, at a random moment."""
    case.start()
    case.wait_for_moment()
    found = {pid: role for pid, role in processes.alive(case.mark).items() if role in roles}
    if not found:
        raise Missed("no such process was there at that moment")
    role = case.draw.choice(sorted(set(found.values())))
    pid = case.draw.choice([pid for pid in found if found[pid] == role])
    processes.kill([pid])
    case.detail += f", {role}"
    end = case.end()
    if end.code not in (0, -9):  # the controller itself can say nothing
        check.one_line(end)
    return restart(case)


@kind("SIGKILL of a random process")
def kill_random(case: Case) -> str:
    """SIGKILL of the controller, a worker or a loader at a random moment."""
    return kill_one(case, "controller", "worker", "loader")


@kind("SIGKILL of all processes")
def kill_everything(case: Case) -> str:
    """SIGKILL of all processes at once at a random moment, as at the end of a container."""
    case.start()
    case.wait_for_moment()
    case.kill()
    return restart(case)


@kind("SIGKILL at a file operation", commands=("train", "reproduce"))
def kill_at_file_operation(case: Case) -> str:
    """SIGKILL of a controller or worker, at a random open, rename or remove in its folder."""
    return at_file_operation(case, "kill")


def at_file_operation(case: Case, action: str) -> str:
    """Let one process meet a fault at a random file operation."""
    assert case.reference is not None
    role = case.draw.choice(["-m", processes.WORKER])  # any process: the first that comes so far
    most = max(int(line) for line in (case.reference / "fault").read_text().split())
    number = case.draw.randrange(1, most + 1)
    case.start(env=file_fault(case, role, number, action))
    end = case.end()
    if not (case.folder / "fault").is_file():
        raise Missed(f"no process of {role} had {number} file operations")
    case.detail += f"{role}, operation {number}: {(case.folder / 'fault').read_text().splitlines()[0]}"
    if end.code not in (0, -9):
        check.one_line(end)
    return restart(case)


@kind("SIGTERM")
def terminate(case: Case) -> str:
    """SIGTERM to the controller at a random moment."""
    return stop(case, signal.SIGTERM)


@kind("SIGTERM to all processes")
def terminate_all(case: Case) -> str:
    """SIGTERM to each process at once, as a scheduler does."""
    case.start()
    case.wait_for_moment()
    processes.kill(list(processes.alive(case.mark)), signal.SIGTERM)
    return after_stop(case)


@kind("SIGINT twice")
def interrupt_twice(case: Case) -> str:
    """Ctrl-C at a random moment, and again up to two seconds later."""
    return stop(case, signal.SIGINT, signal.SIGINT)


def stop(case: Case, *signals: signal.Signals) -> str:
    """Signal the controller."""
    case.start()
    case.wait_for_moment()
    for number, signum in enumerate(signals):
        if number:
            wait_s = case.draw.uniform(0, 2)
            case.detail += f", again after {wait_s:.2f} s"
            processes.wait_until(case.ended, wait_s)
        processes.kill([case.running[-1].pid], signum)
    return after_stop(case, killed=len(signals) > 1)


def after_stop(case: Case, *, killed: bool = False) -> str:
    """Check the end after stop signals, and start again.

    Args:
        killed: a second Ctrl-C may have killed the runs of a study, which then leave a folder in TMPDIR.
    """
    end = case.end()
    if end.code not in check.STOPPED | {0, -9, 128 + 9}:
        raise FellShort(f"ended with code {end.code} after a signal: {end.lines[-1] if end.lines else ''}")
    if end.code > 0:
        check.one_line(end)
    if "Traceback" in end.err:
        raise FellShort(f"a traceback with code {end.code}: {end.lines[-1]}")
    left = list((case.folder / "tmp").glob("exnorm-*"))
    if end.code in (130, 143) and left and not killed:
        raise FellShort(f"{left[0].name} is left in TMPDIR")
    return restart(case)


@kind("two starts at once")
def two_starts(case: Case) -> str:
    """The same command twice, the second one at a random moment of the first."""
    case.start()
    wait_s = case.draw.choice([0.0, case.draw.uniform(0, case.seconds)])
    case.detail += f"the second after {wait_s:.2f} s"
    processes.wait_until(case.ended, wait_s)
    case.start()
    ends = [case.end(0), case.end(1)]
    for end in ends:
        if end.code and "in use by" not in check.one_line(end):
            raise FellShort(f"one of two starts failed with code {end.code}: {end.lines[-1]}")
    if all(end.code for end in ends):
        raise FellShort(f"both starts failed: {ends[0].lines[-1]} | {ends[1].lines[-1]}")
    check.nothing_left(case)
    if case.command == "eval":
        check.once(case.runs()[0] / "evaluations.jsonl")
    return BIT_EQUAL


@kind("clock set back")
def clock_back(case: Case) -> str:
    """The clock goes back by up to ten days during a run; after a kill, the run continues at the earlier time."""
    path = os.pathsep.join([str(HOOK), case.environment()["PYTHONPATH"]])
    after_s, back_s = case.draw.uniform(0, case.seconds), 10 ** case.draw.uniform(1, 6)
    case.detail += f"by {back_s:.0f} s after {after_s:.1f} s; kill "
    case.start(env={"FAULT_CLOCK": f"{after_s} {back_s}", "PYTHONPATH": path})
    case.wait_for_moment()
    case.kill()
    check.nothing_left(case)
    before = check.Before(case)
    end = case.run(env={"FAULT_CLOCK": f"0 {2 * back_s}", "PYTHONPATH": path})
    if end.code:
        raise FellShort(f"the restart at an earlier time ended with code {end.code}: {end.lines[-1]}")
    before.check_resumed()
    return BIT_EQUAL

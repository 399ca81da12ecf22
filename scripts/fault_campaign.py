"""Let real runs meet faults at random moments, and check that nothing is lost: kills, full disks, damaged files.

    python scripts/fault_campaign.py --hours 4 --seed 0                     every kind of fault in turn
    python scripts/fault_campaign.py --hours 1 --seed 1 --kind SIGTERM      one kind

Each injection trains, evaluates or reproduces on tiny images, lets one fault happen, takes its cause away, starts the
same command again, and compares everything with a run without a fault. It prints one line and appends a row to
OUT/log.csv. The same command continues after a stop. `--write` writes the summary of the log, results/faults.csv, from
which `exnorm results` makes the table in results/README.md.

An injection that falls short keeps its folder, and the line says where. Linux only; kinds that mount a file system need
root and are left out otherwise.
"""

import argparse
import csv
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faults import check, machine, processes, signals, storage
from faults.cases import COMMANDS, ROOT, Case, FellShort, Missed, make_case, unmount_below
from faults.kinds import BIT_EQUAL, KINDS, ONE_LINE, Kind

from exnorm.report.faults import COLUMNS as SUMMARY
from exnorm.report.faults import OUTCOMES
from exnorm.runs.provenance import cpu_model, git_state, versions

MODULES = (signals, storage, machine)  # each registers its kinds
COLUMNS = ("number", "seed", "kind", "command", "processes", "outcome", "seconds", "detail", "time", "commit")
FELL_SHORT, MISSED = "fell short", "missed"
Row = dict[str, Any]


def main() -> int:
    """Inject faults until the time is over; return 1 if one fell short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), help="only this kind of fault")
    parser.add_argument("--command", choices=("train", "eval", "reproduce"), help="only this command")
    parser.add_argument("--count", type=int, help="the number of injections [default: as many as fit]")
    parser.add_argument("--out", type=Path, default=Path("fault_campaign"), help="the work folder")
    parser.add_argument("--write", type=Path, metavar="CSV", help="write the summary of the log, and inject nothing")
    options = parser.parse_args()
    out = options.out.resolve()
    log = out / "log.csv"
    if options.write:
        write_summary(read_log(log), options.write)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running case is cleaned up
    kinds = [kind for name, kind in KINDS.items() if options.kind in (None, name)]
    kinds = [kind for kind in kinds if options.command is None or options.command in kind.commands]
    kinds = possible(kinds)
    rows = [row for row in read_log(log) if row["seed"] == str(options.seed)]
    end = time.monotonic() + 3600 * options.hours
    done = fell = 0
    for number in range(len(rows), sys.maxsize):
        if time.monotonic() > end or done == options.count or not kinds:
            break
        row = inject(kinds, number, options.seed, options.command, out)
        append_row(log, row)
        print(line_of(row), flush=True)
        done += 1
        fell += row["outcome"] == FELL_SHORT
    print(f"{done} injections, {fell} of them fell short. Their log is {log}")
    return 1 if fell else 0


def possible(kinds: list[Kind]) -> list[Kind]:
    """Return the kinds that this user can inject, and print the others."""
    if os.geteuid() == 0:
        return kinds
    for kind in kinds:
        if kind.needs_root:
            print(f"left out: {kind.name} needs root, because it mounts a file system")
    return [kind for kind in kinds if not kind.needs_root]


def plan(kinds: list[Kind], number: int, seed: int, command: str | None) -> tuple[Kind, str, int]:
    """Return kind, command and number of processes of an injection: all kinds in a random order, then all again."""
    round_, place = divmod(number, len(kinds))
    draw = random.Random(f"{seed} {round_}")
    kind = draw.sample(kinds, len(kinds))[place]
    pairs = [(name, count) for name in kind.commands for count in (1, 2) if command in (None, name)]
    first = random.Random(f"{seed} {kind.name}").randrange(len(pairs))
    return kind, *pairs[(first + 5 * round_) % len(pairs)]


def inject(kinds: list[Kind], number: int, seed: int, command: str | None, out: Path) -> Row:
    """Do one injection and return its row. Its folder stays if it fell short."""
    kind, name, count = plan(kinds, number, seed, command)
    folder = out / "cases" / f"{seed}-{number}"
    processes.kill_all(str(folder))  # of a campaign that was killed
    unmount_below(folder)
    shutil.rmtree(folder, ignore_errors=True)
    case = make_case(folder, name, count, random.Random(f"{seed} {number} {kind.name}"), out / "references")
    case.logger = kind.logger
    began = time.monotonic()
    outcome, problem = judged(kind, case)
    if outcome != FELL_SHORT:
        shutil.rmtree(folder)
    return {
        "number": number,
        "seed": seed,
        "kind": kind.name,
        "command": name,
        "processes": count,
        "outcome": outcome,
        "seconds": round(time.monotonic() - began, 1),
        "detail": "; ".join(filter(None, [case.detail, problem, str(folder) if outcome == FELL_SHORT else ""])),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
    }


def judged(kind: Kind, case: Case) -> tuple[str, str]:
    """Inject a fault; return the outcome and, if it fell short or was missed, the reason."""
    try:
        outcome = kind.inject(case)
        check.nothing_left(case)
        check.same_as_reference(case)
    except FellShort as problem:
        return FELL_SHORT, str(problem)
    except Missed as problem:
        return MISSED, str(problem)
    finally:
        case.clean_up()
    return outcome, ""


def line_of(row: Row) -> str:
    """Return the line to print for an injection."""
    where = f"{row['command']}, {row['processes']} process{'es' if row['processes'] > 1 else ''}"
    return f"[{row['number']}] {row['kind']} ({where}): {row['outcome']}, {row['seconds']:.0f} s; {row['detail']}"


def commit() -> str:
    """Return the commit of this checkout, with a + if files differ from it."""
    state = git_state(ROOT)
    return "unknown" if state is None else state["commit"][:12] + "+" * state["dirty"]


def read_log(log: Path) -> list[Row]:
    """Return the rows of the log; a line that was cut short by a kill is left out."""
    if not log.is_file():
        return []
    with log.open(encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["commit"]]


def append_row(log: Path, row: Row) -> None:
    """Append a row to the log."""
    begins = not log.exists()
    torn = not begins and not log.read_bytes().endswith(b"\n")
    with log.open("a", encoding="utf-8", newline="") as stream:
        stream.write("\n" * torn)
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerow(row)


def write_summary(rows: list[Row], file: Path) -> None:
    """Write how often each kind was injected, and how that ended. What a fault missed is left out."""
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["outcome"] != MISSED:
            groups[row["kind"], row["command"], int(row["processes"])].append(row)
    order = list(KINDS)
    about = {"device": cpu_model(), "python": platform.python_version()} | {
        name: versions()[name] for name in ("torch", "exnorm")
    }
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, SUMMARY, lineterminator="\n")
        writer.writeheader()
        for key in sorted(groups, key=lambda key: (order.index(key[0]), COMMANDS.index(key[1]), key[2])):
            counts = Counter(row["outcome"] for row in groups[key])
            values = [len(groups[key]), *(counts[outcome] for outcome in (BIT_EQUAL, ONE_LINE, FELL_SHORT))]
            injected = dict(zip(("injected", *OUTCOMES), values, strict=True))
            commits = " ".join(dict.fromkeys(row["commit"] for row in groups[key]))
            writer.writerow({**dict(zip(SUMMARY, key, strict=False)), **injected, **about, "commit": commits})


if __name__ == "__main__":
    sys.exit(main())

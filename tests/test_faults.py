"""The fault campaign: single injections end well, and its checks complain about results that are damaged on purpose."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exnorm.report.faults import COLUMNS, section

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import fault_campaign as campaign  # noqa: E402
from faults import check, processes  # noqa: E402
from faults.cases import Case, End, FellShort, make_case  # noqa: E402
from faults.kinds import KINDS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the commands without a fault, each of which runs once."""
    return tmp_path_factory.mktemp("campaign") / "references"


@pytest.fixture
def ended(references: Path, tmp_path: Path) -> Case:
    """A case whose training has ended as the reference did."""
    case = make_case(tmp_path / "case", "train", 1, random.Random(0), references)
    assert case.reference is not None
    shutil.copytree(case.reference / "here", case.here, dirs_exist_ok=True)
    return case


@pytest.mark.parametrize("name", ["SIGKILL of all processes", "metrics.jsonl cut", "damaged checkpoint"])
def test_an_injection_ends_well(name: str, references: Path, tmp_path: Path) -> None:
    for number in range(5):  # a fault may come too late
        case = make_case(tmp_path / str(number), "train", 1, random.Random(number), references)
        outcome, problem = campaign.judged(KINDS[name], case)
        if outcome != campaign.MISSED:
            break
    assert outcome in ("bit-equal", "one line"), (problem, case.detail)


def test_an_undisturbed_run_passes_and_each_damage_is_found(ended: Case) -> None:
    check.same_as_reference(ended)
    (run,) = ended.runs()
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    edited = json.loads(rows[-1]) | {"val/top1": 1.0}
    damages = {
        "metrics.jsonl": ["".join(rows[:-1]), "".join([*rows, rows[-1]]), "".join([*rows[:-1], json.dumps(edited)])],
        "record.json": ["{}"],
        ".lock": ['{"pid": 1, "host": "another"}'],
        "checkpoints/step-000000018.77.part": ["left over"],
        "error.txt": ["left over\n"],
    }
    for name, texts in damages.items():
        file = run / name
        before = file.read_bytes() if file.exists() else None
        for text in texts:
            file.write_text(text)
            with pytest.raises(FellShort, match=r"rows|differs|held by|more files"):
                check.same_as_reference(ended)
        file.unlink() if before is None else file.write_bytes(before)
    for name in ("record.json", "config.yaml", "checkpoints/best.pt"):
        before = (run / name).read_bytes()
        (run / name).unlink()
        with pytest.raises(FellShort, match="lacks"):
            check.same_as_reference(ended)
        (run / name).write_bytes(before)
    check.same_as_reference(ended)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_another_weight_is_found(part: str, ended: Case) -> None:
    (run,) = ended.runs()
    path = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    state = torch.load(path, weights_only=True)
    tensors = state["model"] if part == "model" else next(iter(state["optimizer"]["state"].values()))
    name, tensor = next((key, value) for key, value in tensors.items() if torch.is_tensor(value) and value.dim())
    tensors[name] = torch.nextafter(tensor, tensor + 1)
    torch.save(state, path)
    with pytest.raises(FellShort, match=f"{part}.*differs"):
        check.same_as_reference(ended)


def test_a_second_run_folder_and_a_silent_restart_are_found(ended: Case) -> None:
    (run,) = ended.runs()
    other = run.with_name("other-s0")
    shutil.copytree(run, other)
    with pytest.raises(FellShort, match="the runs are"):
        check.same_as_reference(ended)
    shutil.rmtree(other)
    (run / "record.json").unlink()
    before = check.Before(ended)
    with (run / "log.txt").open("a") as log:
        log.write("18 steps in 3 epochs\n")
    with pytest.raises(FellShort, match="did not resume"):
        before.check_resumed()
    with (run / "log.txt").open("a") as log:
        log.write("resumed after step 18\n")
    before.check_resumed()


def test_an_evaluation_of_other_data_is_dropped_and_a_doubled_one_is_found(ended: Case) -> None:
    """Evaluations of changed data have ids of their own."""
    assert ended.reference is not None
    (run,) = ended.runs()
    wanted = ended.reference / "here" / run.relative_to(ended.here)
    rows = [json.dumps({"id": name, "step": 18}) + "\n" for name in ("same", "same", "other")]
    (wanted / "evaluations.jsonl").write_text(rows[0])
    (run / "evaluations.jsonl").write_text(rows[0] + rows[2])
    assert check.drop_other_data(ended)
    check.same_as_reference(ended)
    (run / "evaluations.jsonl").write_text(rows[0] + rows[1])
    assert not check.drop_other_data(ended)
    with pytest.raises(FellShort, match="has 2 rows and should have 1"):
        check.same_as_reference(ended)
    (wanted / "evaluations.jsonl").unlink()


def test_a_left_over_process_is_found(tmp_path: Path) -> None:
    mark = str(tmp_path)
    with subprocess.Popen(["sleep", "600"], env=os.environ | {processes.MARK: mark}) as process:
        assert processes.wait_until(lambda: processes.alive(mark), 10), "the kernel shows its variables a moment later"
        assert processes.left_behind(mark, wait_s=0.1) == {process.pid: "other"}
        processes.kill_all(mark)
    assert not processes.left_behind(mark, wait_s=0.1)


def test_only_one_line_of_exnorm_is_one_line() -> None:
    assert check.one_line(End(2, "", "exnorm: warning: a\nexnorm: error: b\n")) == "exnorm: error: b"
    for err in ("", "Traceback (most recent call last):\n", "Killed\nexnorm: error: b\n"):
        with pytest.raises(FellShort):
            check.one_line(End(2, "", err))


def test_the_plan_meets_every_kind_and_the_summary_counts_it(tmp_path: Path) -> None:
    kinds = list(KINDS.values())
    planned = [campaign.plan(kinds, number, 0, None) for number in range(6 * len(kinds))]
    assert {kind.name for kind, _, _ in planned[: len(kinds)]} == set(KINDS)
    pairs = {(kind.name, command, count) for kind, command, count in planned}
    assert pairs == {(kind.name, command, count) for kind in kinds for command in kind.commands for count in (1, 2)}
    assert planned == [campaign.plan(kinds, number, 0, None) for number in range(6 * len(kinds))]
    outcomes = ("bit-equal", "bit-equal", "one line", "fell short", "missed")
    log = tmp_path / "log.csv"
    for number, outcome in enumerate(outcomes):
        row = dict.fromkeys(campaign.COLUMNS, "") | {"number": number, "commit": "abc", "outcome": outcome}
        campaign.append_row(log, row | {"kind": "SIGTERM", "command": "eval", "processes": 2})
    with log.open("a") as stream:
        stream.write("5,0,SIGT")  # the campaign was killed here
    campaign.append_row(log, row | {"kind": "SIGTERM", "command": "eval", "processes": 2, "outcome": "missed"})
    campaign.write_summary(campaign.read_log(log), tmp_path / "faults.csv")
    with (tmp_path / "faults.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert tuple(row) == COLUMNS and row["commit"] == "abc"
    assert [row[key] for key in ("injected", "bit_equal", "one_line", "fell_short")] == ["4", "2", "1", "1"]
    text = section(tmp_path)
    assert text is not None and "| SIGTERM | eval | 2 | 4 | 2 | 1 | 1 |" in text
    assert section(tmp_path / "other") is None

"""What a run leaves on disk: identity, folder, lock, metrics, provenance."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from exnorm.config.compose import compose_train, default_values
from exnorm.config.errors import UserError
from exnorm.engine.launch import prepare
from exnorm.engine.summary import print_result
from exnorm.report.html_report import run_page
from exnorm.report.ratios import run as print_ratios
from exnorm.runs import provenance
from exnorm.runs.folder import RunFolder, RunLocked, check_out, write_json_atomic, write_text_atomic
from exnorm.runs.identity import config_hash, flatten, run_dir
from exnorm.runs.listing import list_runs
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.stored_config import read_stored
from exnorm.runs.table import print_runs


def values(*overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(compose_train(list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return config


def hash8(*overrides: str, fingerprint: str = "f") -> str:
    config = values(*overrides)
    return config_hash(config, defaults=default_values(config["norm"]["name"]), fingerprint=fingerprint)


def test_a_new_option_at_its_default_leaves_the_hash() -> None:
    config, defaults = values(), default_values("en")
    before = config_hash(config, defaults=defaults, fingerprint="f")
    for part in (config, defaults):
        part["trainer"]["new"] = 3
        part["norm"]["new"] = None
    assert config_hash(config, defaults=defaults, fingerprint="f") == before
    config["trainer"]["new"] = 4
    assert config_hash(config, defaults=defaults, fingerprint="f") != before


@pytest.mark.parametrize(
    "override",
    ["trainer.devices=2", "data.root=X", "data.workers=0", "logger=off", "ops.backend=eager", "runs=R", "fresh=true"]
    + ["seed=3", "trainer.passes=2", "trainer.compile=true", "trainer.checkpoint_every_steps=5", "trainer.device=cpu"],
)
def test_where_and_how_fast_is_no_part_of_the_identity(override: str) -> None:
    assert hash8(override) == hash8()


@pytest.mark.parametrize(
    "override",
    ["norm=bn", "norm.pi=10", "model=resnet18", "batch=8x4", "optim.lr=0.3", "trainer.epochs=3", "model.init_from=x"]
    + ["trainer.inference=batch_average", "trainer.precision=bf16", "data=imagefolder", "+model.options.a=1"],
)
def test_what_changes_the_result_changes_the_identity(override: str) -> None:
    assert hash8(override) != hash8()


def test_the_fingerprint_counts_and_an_integer_for_a_float_does_not() -> None:
    assert hash8(fingerprint="g") != hash8()
    config = values("optim.nesterov=true")
    config["norm"]["eps"] = 1
    other = values("optim.nesterov=true", "norm.eps=1.0")
    defaults = default_values("en")
    assert config_hash(config, defaults=defaults, fingerprint="") == config_hash(
        other, defaults=defaults, fingerprint=""
    )


def test_the_hash_of_the_first_release_stays() -> None:
    """A changed value here means that the runs of all users start over: think twice before it is edited."""
    assert config_hash({"norm": {"name": "bn"}, "seed": 1}, defaults={}, fingerprint="f") == "ecc3a7f9"


def test_the_folder_is_named_after_the_run() -> None:
    config = values("seed=3", "batch=8x4", "norm=sn")
    config["model"]["name"] = "hub/net"
    assert run_dir(config, hash8="01234567") == Path("runs/digits/hub_net-sn-8x4-01234567-s3")


def test_flatten_joins_keys_and_keeps_lists_whole() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {"a.b": [1, {"c": 2}], "e": None}


def make_run(path: Path, *overrides: str) -> RunFolder:
    folder = RunFolder(path)
    folder.create(OmegaConf.to_yaml(compose_train(list(overrides)), resolve=True))
    return folder


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", "seed=4")
    assert folder.read_config() == values("seed=4")
    assert folder.read_record() is None
    write_json_atomic(folder.record_file, {"val/top1": 1.5})
    assert folder.read_record() == {"val/top1": 1.5}
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path).read_config()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")

    def dies(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"


STUCK = """
import os, sys, time
from pathlib import Path
from exnorm.runs.folder import write_text_atomic
def stuck(part, path):
    print("written", flush=True)
    time.sleep(600)
os.replace = stuck
write_text_atomic(Path(sys.argv[1]), "new")
"""


def test_the_next_write_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    writers = [
        subprocess.Popen([sys.executable, "-c", STUCK, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        killed, alive = writers
        killed.kill()
        killed.wait()
        parts = {writer: next(tmp_path.glob(f".*.{writer.pid}.part")) for writer in writers}
        others = [parts[killed].name.replace(*names) for names in (("a[1]", "b"), (socket.gethostname(), "elsewhere"))]
        for name in others:  # of another file, and of a machine whose processes are not known here
            (tmp_path / name).touch()
        write_text_atomic(path, "newer")
        assert {file.name for file in tmp_path.iterdir()} == {path.name, parts[alive].name, *others}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


HOLDS = """
import sys, os, json
from exnorm.runs.folder import RunFolder
lock = RunFolder(sys.argv[1]).lock()
print("locked", flush=True)
sys.stdin.read()
os._exit(9)
"""


def test_the_lock_of_another_process_is_named_and_dies_with_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    assert not folder.is_locked()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunLocked, match=rf"process {other.pid} on .+ since \d{{4}}-"):
            folder.lock()
        assert folder.is_locked()
        assert [run.state for run in list_runs(tmp_path)] == ["running"]
        other.stdin.close()
    assert not folder.is_locked()
    with folder.lock():
        assert folder.is_locked()
    assert not folder.is_locked()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A loader process outlives a killed trainer for seconds; the run is free at once."""
    folder = RunFolder(tmp_path)
    lock = folder.lock()
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    loader.start()
    try:
        assert folder.is_locked()
        os.close(lock._handle)  # as the kernel does when the trainer dies
        lock._held = False
        end = time.monotonic() + 60
        while folder.is_locked() and time.monotonic() < end:  # until the fork has come to its first line
            time.sleep(0.01)
        assert loader.is_alive() and not folder.is_locked()
    finally:
        loader.kill()
        loader.join()


def test_every_start_is_noted_and_another_config_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert prepare(folder, values(), "aaaaaaaa", data_id="d") is True
    assert prepare(folder, values(), "aaaaaaaa", data_id="d") is False
    noted = json.loads(folder.provenance_file.read_text())
    assert noted["config_hash"] == "aaaaaaaa"
    assert [start["versions"] for start in noted["resumed"]] == [noted["versions"]]
    with pytest.raises(UserError, match=r"made by another config \(aaaaaaaa\)\. Move it away"):
        prepare(folder, values(), "bbbbbbbb", data_id="d")


def test_a_loss_that_was_not_finite_is_printed_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    write_json_atomic(folder.record_file, {"val/top1": 10.0, "val/top5": 50.0, "val/loss": None, "hours": 1.0})
    print_result(folder)
    assert "not finite" in capsys.readouterr().out


def test_states_and_numbers_of_runs(tmp_path: Path) -> None:
    interrupted = make_run(tmp_path / "a" / "interrupted", "norm=sn", "batch=8x4", "trainer.epochs=8")
    MetricsLog(interrupted.metrics_file).append({"step": 3, "epoch": 2, "val/top1": 40.0})
    MetricsLog(interrupted.metrics_file).append({"step": 4, "epoch": 3})
    finished = make_run(tmp_path / "b" / "finished")
    write_json_atomic(finished.record_file, {"val/top1": 50.0})
    make_run(tmp_path / "b" / "failed").error_file.write_text("no memory")
    damaged = make_run(tmp_path / "b" / "damaged")
    damaged.config_file.write_text("norm: [")
    (tmp_path / "b" / "half").mkdir()
    (tmp_path / "b" / "half" / "metrics.jsonl").write_text("")
    (tmp_path / ".multirun").mkdir()
    (tmp_path / ".multirun" / "config.yaml").write_text("")
    found = {run.path.name: run for run in list_runs(tmp_path)}
    states = {"interrupted": "interrupted", "finished": "finished", "failed": "failed"}
    assert {name: run.state for name, run in found.items()} == states | {"damaged": "unreadable", "half": "unreadable"}
    run = found["interrupted"]
    assert (run.epoch, run.epochs, run.value, run.norm, run.batch, run.data) == (3, 8, 40.0, "sn", "8x4", "digits")
    assert found["finished"].value == 50.0
    with pytest.raises(ValueError, match="no folder"):
        list_runs(tmp_path / "nowhere")


DAMAGE = [  # a file of a run, what somebody wrote into it, and what the commands that need it say
    ("config.yaml", b"norm: [", "no mapping of settings"),
    ("config.yaml", b"- norm", "no mapping of settings"),
    ("config.yaml", b"norm: \xff", "no mapping of settings"),
    ("config.yaml", b"{batch: 3, seed: 0, trainer: {}, norm: {name: en}}", "no batch"),
    ("config.yaml", b"{batch: 1x8, seed: 0, trainer: {}, norm: {name: en}, model: {name: 3}}", "no data"),
    ("metrics.jsonl", b"[1]\n", "line 1 is damaged"),
    ("metrics.jsonl", b'{"step": 1, "epoch": 1}\n{"step": "two"}\n', "line 2 is damaged"),
    ("metrics.jsonl", b'{"step": 1, "epoch": "one", "val/top1": 5.0}\n', "line 1 is damaged"),
    ("metrics.jsonl", b'{"step": 1, "epoch": 1, "val/top1": "five"}\n', "line 1 is damaged"),
    ("metrics.jsonl", b'{"step": 1, "epoch": 1, "ratio/bn1/in": [0.5]}\n', "line 1 is damaged"),
]


@pytest.mark.parametrize(("name", "text", "said"), DAMAGE)
def test_damage_in_a_run_folder_is_named_in_one_line(tmp_path: Path, name: str, text: bytes, said: str) -> None:
    """Other runs are listed all the same."""
    folder = make_run(tmp_path / "run")
    make_run(tmp_path / "whole")
    (folder.path / name).write_bytes(text)
    assert [run.state for run in list_runs(tmp_path)] == ["unreadable", "interrupted"]
    for command in (run_page, lambda folder: print_ratios(folder.path)):
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            command(folder)


@pytest.mark.parametrize("text", ["{}", "{", '{"val/top1": "five"}', "[]"])
def test_a_damaged_record_or_provenance_hides_nothing_else(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path / "run")
    folder.record_file.write_text(text)
    folder.provenance_file.write_text(text)
    print_runs(list_runs(tmp_path))
    assert "Origin of the run" in run_page(folder)


@pytest.mark.parametrize("name", ["none/x.html", "x.txt", "folder.html"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=name.partition("/")[0]):
        check_out(tmp_path / name, ".html", ".htm")
    check_out(tmp_path / "x.HTML", ".html", ".htm")


def test_a_torn_line_is_skipped_and_never_joined(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append({"loss": 1.0, "step": 1})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
    with open(path, "a") as stream:
        stream.write('{"step": 2, "lo')
    assert MetricsLog.read(path) == [{"step": 1, "loss": 1.0}]
    MetricsLog(path).append({"step": 2})
    assert [row["step"] for row in MetricsLog.read(path)] == [1, 2]


def test_a_line_damaged_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nxx\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        MetricsLog.read(path)


def test_cut_back_keeps_the_rows_up_to_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float("nan"), "nested": {"x": [float("inf"), 1.5]}})
    log.cut_back(2, 0)
    assert MetricsLog.read(log.path) == [{"step": s, "loss": None, "nested": {"x": [None, 1.5]}} for s in (1, 2)]
    assert MetricsLog.read(tmp_path / "missing") == []
    with pytest.raises(ValueError, match="step"):
        log.append({"loss": 1.0})


def test_cut_back_drops_a_validation_that_the_checkpoint_does_not_know_of(tmp_path: Path) -> None:
    """A checkpoint after the last step of epoch 2, before its validation: the row of the epoch comes again."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    first = {"step": 6, "epoch": 1, "val/top1": 40.0}
    inside = {"step": 12, "epoch": 2, "batch/loss": 1.0}
    for row in (first, inside, {"step": 12, "epoch": 2, "val/top1": 50.0}):
        log.append(row)
    log.cut_back(12, 2)
    assert len(MetricsLog.read(log.path)) == 3
    log.cut_back(12, 1)
    assert MetricsLog.read(log.path) == [first, inside]


def test_a_row_that_a_checkpoint_knows_of_and_the_log_has_lost_is_named(tmp_path: Path) -> None:
    """As after a power cut that took the end of the file, or a copy that was cut short."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for epoch in (1, 2):
        log.append({"step": 6 * epoch, "epoch": epoch, "batch/loss": 1.0})
        log.append({"step": 6 * epoch, "epoch": epoch, "val/top1": 50.0})
    log.check_complete(2)
    before = log.path.read_bytes()
    log.path.write_bytes(before[:-5])
    MetricsLog(log.path).check_complete(1)
    with pytest.raises(ValueError, match="has lost the row of epoch 2") as lost:
        log.check_complete(2)
    with log.path.open("a") as stream:  # what the message offers
        stream.write("\n" + str(lost.value).partition("add the line ")[2] + "\n")
    log.path.write_text("".join(line + "\n" for line in log.path.read_text().splitlines() if line.endswith("}")))
    log.check_complete(2)


def test_each_row_is_on_the_disk_when_it_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is synced. Without this, a power cut could leave a checkpoint that knows of a row that is gone."""
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1})
    assert len(synced) == 1


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_provenance_names_commit_and_uncommitted_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.collect(["exnorm"])["git"] is None and provenance.uncommitted_patch() is None
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("old\n")
    for name in ("sub", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "results" / "record.csv").write_text("old\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    state = provenance.collect(["exnorm", "train"])
    assert len(state["git"]["commit"]) == 40 and state["git"]["dirty"] is False
    (tmp_path / "results" / "record.csv").write_text("what a study measured\n")
    assert provenance.git_state(tmp_path)["dirty"] is False and provenance.uncommitted_patch() is None
    (tmp_path / "a.py").write_text("new\n")
    patch = provenance.uncommitted_patch()
    assert patch is not None and "-old\n+new\n" in patch
    assert provenance.git_state(tmp_path)["dirty"] is True
    assert provenance.git_state(tmp_path / "sub") is None
    git(tmp_path, "commit", "-am", "second")
    (tmp_path / "exnorm").mkdir()
    (tmp_path / "notes.txt").write_text("not code\n")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "exnorm" / "my_norm.py").write_text("mine\n")
    assert provenance.git_state(tmp_path)["dirty"] is True
    assert "my_norm.py" in (provenance.uncommitted_patch() or "") and "+mine" in (provenance.uncommitted_patch() or "")
    monkeypatch.setattr(provenance, "PATCH_BYTES", 20)
    assert "cut here" in (provenance.uncommitted_patch() or "")


def test_provenance_names_no_machine_and_is_json() -> None:
    import socket

    found = provenance.collect(["exnorm", "train"])
    text = json.dumps(found)
    assert found["versions"]["hydra-core"] and found["command"] == ["exnorm", "train"]
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_the_list_of_runs_says_why_one_failed_or_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    make_run(tmp_path / "a").error_file.write_text("the loss is not finite [at] step 3\n")
    make_run(tmp_path / "b").metrics_file.write_text("{}\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("a: [")
    make_run(tmp_path / "d")
    failed, torn, damaged, interrupted = list_runs(tmp_path)
    assert (failed.state, failed.reason) == ("failed", "the loss is not finite [at] step 3")
    assert torn.state == damaged.state == "unreadable"
    assert "metrics.jsonl, line 1 is damaged" in torn.reason and "config.yaml is damaged" in damaged.reason
    assert (interrupted.state, interrupted.reason) == ("interrupted", "")
    print_runs(list_runs(tmp_path))
    shown = capsys.readouterr().out
    assert all(run.reason in shown for run in (failed, torn, damaged))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_characters="$"))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab1e-.~_", min_size=1), inner))


@settings(deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), VALUES))
def test_a_stored_configuration_is_read_as_omegaconf_reads_it(values: dict[str, Any]) -> None:
    """Texts that look like numbers, dates or truth values stay texts."""
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    assert repr(read_stored(text)) == repr(OmegaConf.to_container(OmegaConf.create(text), resolve=True))


@pytest.mark.parametrize(
    "text", ["a: 1e-3", "a: -2E5", "a: 1.5e3", "a: '1e-3'", "a: on", "a: 2020-01-01", "a: {b: '${c}'}\nc: 3"]
)
def test_a_configuration_that_was_edited_by_hand_is_read_as_omegaconf_reads_it(text: str) -> None:
    assert repr(read_stored(text)) == repr(OmegaConf.to_container(OmegaConf.create(text), resolve=True))

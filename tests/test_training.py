"""Whole trainings through the command line: what lies in a run folder, and what happens to bad input."""

import csv
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CliRunner
from engine_cases import (
    assert_same_run,
    checkpoints,
    last_state,
    make_image_folder,
    metrics,
    only_run,
    tiny,
    train,
    train_here,
)

import exnorm
from exnorm.config.compose import compose_train
from exnorm.data import data_set
from exnorm.data.loader import SeededImages
from exnorm.data.transforms import eval_transform
from exnorm.engine import launch
from exnorm.engine.banner import busy
from exnorm.engine.calibrate import batch_average
from exnorm.engine.distributed import World
from exnorm.models import build_network, classifier
from exnorm.norms import BatchScopeNorm
from exnorm.runs.folder import RunFolder, RunLocked


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with EN, two epochs of six steps."""
    return train(tiny(images, "logger.csv=true"), tmp_path_factory.mktemp("finished"))


def test_a_run_writes_metrics_of_every_epoch_with_the_ratios_of_every_layer(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 12]
    for row in rows:
        assert {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "top1", "top5")} <= row.keys()
        assert {"lr", "images_per_s", "epoch"} <= row.keys()
        for normalizer in ("in", "ln", "bn"):
            assert {f"ratio/conv1.1/{normalizer}", f"ratio/conv1.1/{normalizer}/std"} <= row.keys()
    with open(finished / "metrics.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["val/loss"]) for row in table] == pytest.approx([row["val/loss"] for row in rows])


def test_a_run_keeps_its_record_provenance_and_last_checkpoints(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record["val/top1"] == metrics(finished)[-1]["val/top1"]
    assert sum(record["ratio"].values()) == pytest.approx(1, abs=1e-5)
    assert {"best", "hours", "device", "backend", "parameters", "gflops_per_image", "inference"} <= record.keys()
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["command"][:2] == ["exnorm", "train"]
    assert provenance["config_hash"] in finished.name
    assert [path.name for path in checkpoints(finished)] == ["step-000000006.pt", "step-000000012.pt"]
    assert (finished / "checkpoints" / "best.pt").is_file()
    assert not list(finished.rglob("*.part"))


def test_a_run_says_what_it_is_before_the_first_step(finished: Path) -> None:
    text = (finished / "log.txt").read_text()
    banner = text[: text.index("epoch 1/2:")]
    for words in ("device CPU", "precision fp32", "back end eager", "M parameters", "GFLOPs", "12 steps in 2 epochs"):
        assert words in banner
    assert "batch 1x8: gradient over 8 samples, BN's scope 8, on 1 device" in banner
    assert "about" in banner


def test_a_hint_is_given_where_others_keep_the_cores_busy() -> None:
    (line,) = busy(2, 3.1, 2)
    assert "load 3.1 on 2 cores" in line and "OMP_NUM_THREADS=1" in line
    assert busy(2, 1.2, 2) == busy(1, 3.1, 2) == []


def test_the_same_command_again_prints_the_result_and_trains_nothing(
    finished: Path, images: Path, run_cli: CliRunner
) -> None:
    """And an error of a process that failed after the end of the run is forgotten."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert RunFolder(finished).continues().startswith("prints the result")
    RunFolder(finished).error_file.write_text("worker 0 was killed by SIGKILL\n", encoding="utf-8")
    again = run_cli(*tiny(images, "logger.csv=true"), cwd=finished.parents[2])
    assert again.returncode == 0, again.stderr
    assert "has finished" in again.stdout
    assert "top-1" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_finished_run_gets_back_its_lost_configuration(finished: Path, images: Path, run_cli: CliRunner) -> None:
    file = finished / "config.yaml"
    before = file.read_bytes()
    for text in (None, before[: len(before) // 2]):
        file.unlink() if text is None else file.write_bytes(text)
        refused = run_cli("eval", str(finished))
        assert (
            refused.returncode == 2
            and "provenance.json again, without fresh=true: it writes the file anew" in refused.stderr
        )
        again = run_cli(*tiny(images, "logger.csv=true"), cwd=finished.parents[2])
        assert again.returncode == 0 and "config.yaml was missing or damaged" in again.stdout
        assert file.read_bytes() == before


def test_a_run_leaves_nothing_in_the_current_folder_but_runs(finished: Path) -> None:
    assert [path.name for path in finished.parents[2].iterdir()] == ["runs"]


def test_exnorm_load_gives_the_trained_model(finished: Path) -> None:
    model = exnorm.load(finished)
    assert not model.training
    saved = last_state(finished)["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_eval_equals_the_record_also_on_two_processes(finished: Path, run_cli: CliRunner) -> None:
    """21 validation images do not divide among two processes or into batches of 4."""
    record = json.loads((finished / "record.json").read_text())
    for more in ([], ["devices=2", "batch_size=4", "data.workers=1"]):
        done = run_cli("eval", finished, *more, cwd=finished.parents[2], env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        row = json.loads((finished / "evaluations.jsonl").read_text().splitlines()[-1])
        assert row["images"] == 21
        assert row["val/top1"] == record["val/top1"]
        assert row["val/top5"] == record["val/top5"]
        assert row["val/loss"] == pytest.approx(record["val/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("devices=0", "devices=0 is not possible; give 1 or more"),
        ("batch_size=0", "batch_size=0 is not possible; give 1 or more"),
        ("calibration_batches=-1", "calibration_batches=-1 is not possible; give 1 or more"),
        ("inference=mean", "inference=mean is unknown; allowed: moving_average, batch_average"),
        ("precision=fp16", "precision=fp16 needs a GPU. On a CPU use precision=bf16 or precision=fp32"),
    ],
)
def test_eval_refuses_what_cannot_work(
    argument: str, line: str, finished: Path, cli_here: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = cli_here("eval", finished, argument)
    assert (done.returncode, done.stderr) == (2, f"exnorm: error: {line}\n")


def test_eval_on_a_gpu_that_is_not_there_is_one_line_with_torchs_reason(finished: Path, run_cli: CliRunner) -> None:
    done = run_cli("eval", finished, "device=cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("exnorm: error: device=cuda, but torch finds no GPU: ")
    assert done.stderr.endswith(". Type device=cpu to use the CPU\n")


def test_a_damaged_checkpoint_is_passed_over_and_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exnorm.engine.checkpoint import load_latest

    folder = RunFolder(finished)
    last = checkpoints(finished)[-1]
    whole = last.read_bytes()
    middle = len(whole) // 2
    try:
        for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b""):
            last.write_bytes(damaged)
            state = load_latest(folder)
            assert state is not None
            assert state["step"] == 6
            assert "the one before it is used" in capsys.readouterr().err
    finally:
        last.write_bytes(whole)


def test_batch_average_is_the_total_variance_over_the_batches(images: Path) -> None:
    """Against the statistics of one batch that holds all images, as all batches together do."""
    config = compose_train(["model=resnet18", "model.name=test_resnet", "norm=sn", "data=imagefolder"])
    config.data.root, config.data.image_size, config.data.resize = str(images), 32, 32
    splits = data_set(config.data).load(config.data)
    dataset = SeededImages(splits.train, eval_transform(config.data), seed=0)
    model = build_network(partial(classifier, num_classes=3), config.model, config.norm)
    model.conv1[1].train()
    world = World(0, 1, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = batch_average(model, dataset, scope=8, batches=6, workers=0, precision="fp32", world=world)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pixels = torch.stack([dataset[0, index][0] for index in range(len(dataset))])
    every = dataset.transform.normalize(pixels)
    first = model.conv1[0](every)
    assert torch.allclose(found["conv1.1.running_mean"], first.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(found["conv1.1.running_var"], first.var((0, 2, 3), correction=0), rtol=1e-5)
    assert all(isinstance(module, BatchScopeNorm) for module in model.modules() if hasattr(module, "running_mean"))


BAD = {
    "norm=enn": "unknown norm 'enn': did you mean 'en'?",
    "data=imagenett": "unknown data 'imagenett'",
    "trainer.epoch=1": "did you mean 'trainer.epochs'?",
    "trainer.epochs=abc": "trainer.epochs=abc is not an integer",
    "norm.pi=abc": "norm.pi=abc: expected an integer",
    "norm.pi=0": "pi=0 is not possible",
    "batch=8x0": "batch=8x32",
    "batch=abc": "batch=8x32",
    "trainer.devices=3": "trainer.devices can be 1, 2, 4, 8",
    "batch=1x100": "takes 100 images a step, but data has 48",
    "data.root=nowhere": "DIR/train/<class>",
    "model.init_from=nowhere": "no such run folder or file",
    "batch=1x1": "more than 1 value per channel",
    "trainer.eval_batch_size=0": "give 1 or more",
    "trainer.precision=fp8": "allowed: fp32, bf16, fp16",
    "trainer.cuda_graph=true": "needs a GPU",
    "optim.power=-1": "above 0, such as 0.9",
    "optim.decay=weight": "allowed: all, weights",
    "data.resize=16": "data.resize=32",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_gets_one_line_and_makes_no_run_folder(
    argument: str, images: Path, tmp_path: Path, cli_here: CliRunner
) -> None:
    done = cli_here(*tiny(images, argument))
    assert done.returncode == 2
    assert BAD[argument] in done.stderr
    assert done.stderr.startswith("exnorm: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    images: Path, tmp_path: Path, cli_here: CliRunner
) -> None:
    done = cli_here(*tiny(images, "optim.lr=1e30", "trainer.checkpoint_every_steps=1"))
    assert done.returncode == 2
    assert "the loss is not finite at step" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    kept = last_state(only_run(tmp_path))
    assert f"at step {kept['step'] + 1} " in done.stderr
    assert f"the checkpoint after step {kept['step']} is kept" in done.stderr


def test_no_checkpoint_is_promised_where_there_is_none(images: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    done = cli_here(*tiny(images, "optim.lr=1e30"))
    assert done.returncode == 2 and "the loss is not finite at step" in done.stderr
    assert "kept" not in done.stderr and not list(tmp_path.rglob("*.pt"))


def test_too_many_broken_images_end_a_run_with_one_line_and_are_listed(tmp_path: Path, cli_here: CliRunner) -> None:
    """Found by a loader process; the list outlives the run folder's other files."""
    broken = make_image_folder(tmp_path / "images") / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50])
    done = cli_here(*tiny(tmp_path / "images", "data.workers=1"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    line = (
        "exnorm: error: 1 of 48 training images of imagefolder are broken, such as train/dog/3.png (image file is trunc"
    )
    assert done.stderr.startswith(line) and "data.max_bad_fraction=0.01 allows 0" in done.stderr
    (listed,) = (tmp_path / "runs").glob("*/*/bad_images.csv")
    assert "train/dog/3.png" in listed.read_text()


def test_a_broken_image_whose_name_is_no_utf8_is_said_in_one_line(tmp_path: Path, run_cli: CliRunner) -> None:
    folder = make_image_folder(tmp_path / "images") / "train" / "dog"
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    done = run_cli(*tiny(tmp_path / "images"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "1 of 49 training images of imagefolder are broken, such as train/dog/caf" in done.stderr


@pytest.mark.slow
def test_two_runs_of_one_command_are_bit_equal(images: Path, tmp_path: Path) -> None:
    arguments = tiny(images, "data.workers=2", "model.drop_rate=0.2")
    assert_same_run(train(arguments, tmp_path / "a"), train_here(arguments, tmp_path / "b"))


def test_a_start_that_finds_the_run_in_use_leaves_its_folder_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two starts at the same instant, both make the folder; the one without the lock must not remove it."""

    def locked(*_: object, **__: object) -> None:
        raise RunLocked("in use")

    monkeypatch.setattr(launch, "run_workers", locked)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunLocked):
        launch.run(compose_train(tiny(images)[1:]))
    run = only_run(tmp_path)
    assert not (run / "error.txt").exists()


@pytest.mark.slow
def test_fresh_starts_over(images: Path, tmp_path: Path) -> None:
    run = train_here(tiny(images, "trainer.epochs=1"), tmp_path)
    (run / "mark").touch()
    assert train_here(tiny(images, "trainer.epochs=1", "fresh=true"), tmp_path) == run
    assert not (run / "mark").exists()


@pytest.mark.slow
def test_a_sweep_over_two_norms_makes_two_runs(images: Path, tmp_path: Path, run_cli: CliRunner) -> None:
    done = run_cli(*tiny(images, "-m", "norm=bn,sn", "trainer.epochs=1"))
    assert done.returncode == 0, done.stderr
    records = list(tmp_path.glob("runs/*/*/record.json"))
    assert sorted(path.parent.name.split("-")[1] for path in records) == ["bn", "sn"]
    listed = run_cli("runs")
    assert listed.stdout.count("finished") == 2


@pytest.mark.slow
def test_batch_averages_as_the_rule_of_inference(images: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    """A run that validates with them, and `exnorm eval` of it, agree; the moving average gives another loss."""
    run = train_here(
        tiny(images, "trainer.inference=batch_average", "trainer.calibration_batches=3", "norm=sn"), tmp_path
    )
    record = json.loads((run / "record.json").read_text())
    losses = {}
    for rule in ("batch_average", "moving_average"):
        done = cli_here("eval", run, f"inference={rule}", "calibration_batches=3")
        assert done.returncode == 0, done.stderr
        losses[rule] = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["val/loss"]
    assert losses["batch_average"] == pytest.approx(record["val/loss"], rel=1e-5)
    assert losses["moving_average"] != pytest.approx(record["val/loss"], rel=1e-3)


@pytest.mark.slow
def test_training_starts_from_another_run(images: Path, tmp_path: Path) -> None:
    """With a rate of zero the weights of the first run come out unchanged, BN's in every normalizer of EN."""
    first = train_here(tiny(images, "norm=bn", "trainer.epochs=1"), tmp_path)
    frozen = ["optim.lr=0", "optim.weight_decay=0", "trainer.epochs=1"]
    second = train_here(tiny(images, "norm=en", f"model.init_from={first}", *frozen), tmp_path)
    source, target = last_state(first)["model"], last_state(second)["model"]
    assert torch.equal(target["conv1.0.weight"], source["conv1.0.weight"])
    assert torch.equal(target["conv1.1.weight"], source["conv1.1.weight"].expand(3, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["raise ImportError('broken import')", "def init(**_):\n    raise OSError('no disk')\n"]
)
def test_a_wandb_that_fails_does_not_stop_the_training(
    fault: str, images: Path, tmp_path: Path, run_cli: CliRunner
) -> None:
    broken = tmp_path / "broken"
    (broken / "wandb").mkdir(parents=True)
    (broken / "wandb" / "__init__.py").write_text(fault)
    path = os.pathsep.join([str(broken), str(Path(exnorm.__file__).parents[1])])
    done = run_cli(*tiny(images, "trainer.epochs=1", "logger.wandb=offline"), env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "W&B could not start" in done.stderr
    assert only_run(tmp_path).joinpath("record.json").is_file()

"""The command line: what it prints, where its mistakes go, and that it starts without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CliRunner

from exnorm.config.compose import compose_train, group_options
from exnorm.runs.records import COLUMNS, change_records

NORMS = ", ".join(group_options("norm"))

# `exnorm.engine.launch` is replaced: these tests are about what reaches it.
COMMAND = """
import sys, types
from exnorm.config.errors import UserError
launch = types.ModuleType("exnorm.engine.launch")
def run(config):
    if config.seed == 13:
        raise UserError("seed 13 is bad luck: type another")
    if config.seed == 14:
        raise RuntimeError("a bug")
    print("RUN", config.norm.name, config.model.name, config.batch, config.seed, config.trainer.epochs)
launch.run = run
launch.evaluate_run = lambda run_dir, overrides: print("EVAL", run_dir.name, overrides)
sys.modules["exnorm.engine.launch"] = launch
from exnorm.cli import main
try:
    main()
finally:
    assert not {"torch", "torchvision", "timm"} & set(sys.modules), "the controller has imported torch"
"""
TIMM_CACHE = "regnety_008\nresnet18\nvgg11_bn\n"


def exnorm(folder: Path, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with a cached list of timm's models."""
    from importlib.metadata import version

    cache = folder / "cache" / "exnorm" / f"timm-{version('timm')}.txt"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(TIMM_CACHE)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "100"}
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMAND, *arguments],
        cwd=work,
        env=env,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=False,
    )


def test_train_hands_the_composed_run_over_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = exnorm(tmp_path, "train", "norm=sn", "model=regnety_008", "batch=8x32", "trainer.epochs=2")
    assert done.stdout == "RUN sn regnety_008 8x32 0 2\n", done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_a_sweep_runs_every_combination_wherever_the_flag_stands(tmp_path: Path) -> None:
    sweep = ["norm=bn,sn", "-m", "model=resnet18,vgg11_bn", "batch=8x32,8x2"]
    done = exnorm(tmp_path, "train", *sweep, "trainer.epochs=8")
    runs = [f"RUN {n} {m} {b} 0 8" for n in ("bn", "sn") for m in ("resnet18", "vgg11_bn") for b in ("8x32", "8x2")]
    assert done.stdout.splitlines() == runs, done.stderr
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["runs"]
    assert [file.name for file in (tmp_path / "work" / "runs").iterdir()] == [".multirun"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "norm=bnn"], f"unknown norm 'bnn': did you mean 'bn'? allowed: {NORMS}"),
        (["train", "trainer.epoch=1"], "unknown key 'trainer.epoch': did you mean 'trainer.epochs'?"),
        (["train", "trainer.epochs=abc"], "trainer.epochs=abc is not an integer, such as trainer.epochs=100"),
        (["train", "norm.pi=abc"], "norm.pi=abc: expected an integer such as 50"),
        (
            ["train", "+foo.bar=abc"],
            "unknown key 'foo.bar': allowed: batch, data, debug, fresh, logger, model, norm, ops, optim, runs, seed, "
            "task, trainer",
        ),
        (["train", "norm=bn,sn"], "norm=bn,sn has several values. Add -m to run one after the other"),
        (["train", "-m", "norm=bn,xx"], f"unknown norm 'xx': allowed: {NORMS}"),
        (["train", "seed=13"], "seed 13 is bad luck: type another"),
        (["show", "norm", "enn"], f"unknown norm 'enn': did you mean 'en'? allowed: {NORMS}"),
        (
            ["list", "models", "--filter", "x*"],
            "no model matches 'x*'. Try a wider pattern, such as --filter 'resnet*'",
        ),
        (["reprodce"], "No such command 'reprodce'. Did you mean 'reproduce'? See exnorm --help"),
        (["table"], "Missing argument 'study'. See exnorm table --help"),
        (["table", "sn-table2", "--scale"], "Option '--scale' requires an argument. See exnorm --help"),
        (["runs", "nowhere"], "there is no folder nowhere. Type exnorm runs FOLDER, where FOLDER has your runs"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path: Path, arguments: list[str], line: str) -> None:
    done = exnorm(tmp_path, *arguments)
    assert (done.stderr, done.returncode, done.stdout) == (f"exnorm: error: {line}\n", 2, "")


def test_a_failing_job_does_not_stop_the_others_of_its_sweep(tmp_path: Path) -> None:
    done = exnorm(tmp_path, "train", "-m", "seed=13,1", "trainer.epochs=8")
    assert done.returncode == 2 and done.stdout == "RUN en resnet50 1x32 1 8\n"
    assert "seed=13" in done.stderr and "exnorm: error: seed 13 is bad luck" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_failing_job_of_a_sweep_has_its_line_and_the_end_says_which(tmp_path: Path) -> None:
    """The line comes when the job fails, before the next one runs; a bug has its traceback."""
    done = exnorm(
        tmp_path, "train", "-m", "seed=13,1,14,2", "batch=8x2,8x4", "trainer.epochs=8", stderr=subprocess.STDOUT
    )
    names = {seed: [f"seed={seed} batch={batch}" for batch in ("8x2", "8x4")] for seed in (13, 14)}
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith(("RUN", "exnorm: error"))]
    assert [line.split()[0] for line in told] == [
        "exnorm:",
        "exnorm:",
        "RUN",
        "RUN",
        "exnorm:",
        "exnorm:",
        "RUN",
        "RUN",
    ]
    assert told[1] == f"exnorm: error: seed 13 is bad luck: type another (job 1: {names[13][1]})"
    assert lines.count("RuntimeError: a bug") == 2 and told[5].endswith(f"(job 5: {names[14][1]})")
    assert lines[-1] == f"exnorm: 4 of 8 jobs failed: {'; '.join(names[13] + names[14])}"
    assert done.returncode == 1


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    done = exnorm(tmp_path, "train", "seed=14")
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--help"], "train"),
        (["train", "--help"], f"norm: {NORMS}"),
        (["train", "--cfg", "job"], "precision: fp32"),
        (["eval", "--help"], "data.root=DIR"),
        (["list", "--help"], "--filter"),
        (["show", "--help"], "norm"),
        (["doctor", "--help"], "machine"),
        (["runs", "--help"], "state"),
        (["fold", "--help"], "convolutions"),
        (["--version"], "exnorm 0.1.0"),
    ],
)
def test_help_and_version_come_without_torch(tmp_path: Path, arguments: list[str], text: str) -> None:
    done = exnorm(tmp_path, *arguments)
    assert done.returncode == 0 and text in done.stdout, done.stderr


def test_eval_passes_the_overrides_on(tmp_path: Path) -> None:
    (tmp_path / "work" / "r").mkdir(parents=True)
    done = exnorm(tmp_path, "eval", "r", "data.root=X", "checkpoint=best")
    assert done.stdout == "EVAL r ['data.root=X', 'checkpoint=best']\n", done.stderr
    assert exnorm(tmp_path, "eval", "nowhere").returncode == 2


def test_list_prints_names_with_what_they_are(tmp_path: Path) -> None:
    norms = exnorm(tmp_path, "list", "norms").stdout.splitlines()
    assert [line.split()[0] for line in norms] == group_options("norm")
    assert any(line.split()[:3] == ["sn", "Switchable", "Normalization:"] for line in norms)
    assert "digits" in exnorm(tmp_path, "list", "data").stdout
    models = exnorm(tmp_path, "list", "models").stdout.split("\n")
    assert "vgg11_bn" in models and sum(line.split()[:1] == ["resnet18"] for line in models) == 1
    assert exnorm(tmp_path, "list", "models", "--filter", "vgg*").stdout == "vgg11_bn\n"


def test_show_prints_the_card_and_the_options(tmp_path: Path) -> None:
    shown = exnorm(tmp_path, "show", "norm", "sn").stdout
    assert "Switchable Normalization" in shown.splitlines()[0] and "normalizers: [in, ln, bn]" in shown
    assert "image_size: 32" in exnorm(tmp_path, "show", "data", "digits").stdout
    assert "name: resnet18" in exnorm(tmp_path, "show", "model", "resnet18").stdout


def test_runs_lists_a_folder(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from exnorm.runs.folder import RunFolder

    name = "resnet50-en-1x32-01234567-s0"
    RunFolder(tmp_path / "work" / "runs" / "digits" / name).create(OmegaConf.to_yaml(compose_train([]), resolve=True))
    done = exnorm(tmp_path, "runs")
    assert any(line.split()[:2] == [name, "interrupted"] for line in done.stdout.splitlines()), done.stderr
    (tmp_path / "work" / "empty").mkdir()
    assert "no runs yet" in exnorm(tmp_path, "runs", "empty").stdout


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_every_command_prints_in_any_encoding(tmp_path: Path, encoding: str, run_cli: CliRunner) -> None:
    """A table has ± and –, an error the name of a file, which may be no UTF-8 either."""
    usual = dict.fromkeys(COLUMNS["runs"], "1") | {"scale": "mini", "metric": "top1", "cell": "pi=1"}
    rows = [usual | {"seed": str(seed), "value": str(80 + seed)} for seed in (0, 1)]
    change_records(tmp_path / "results", "en-pi", lambda before: {**before, "runs": rows})
    env = {"PYTHONIOENCODING": encoding}
    shown = run_cli("table", "en-pi", env=env)
    plus_minus = "+-" if encoding == "ascii" else "\xb1"
    assert shown.returncode == 0 and f"80.50 {plus_minus} 0.71 (2)" in shown.stdout, shown.stderr
    name = os.fsdecode("Bücher-鳥-".encode() + b"\xe9")
    done = run_cli("runs", name, env=env)
    assert done.returncode == 2 and done.stderr.startswith("exnorm: error: there is no folder B")


def test_the_package_offers_its_functions_without_importing_torch() -> None:
    code = (
        "import sys, exnorm\n"
        "assert 'torch' not in sys.modules and {'convert', 'audit', 'load'} <= set(exnorm.__all__)\n"
        "try: exnorm.converts\n"
        "except AttributeError as problem: assert 'convert' in str(problem)\n"
        "else: raise SystemExit(1)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

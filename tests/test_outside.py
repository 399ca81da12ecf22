"""Options from outside: folders of a user, installed packages, and classes by their full name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from engine_cases import make_image_folder, tiny, train, train_here
from torch import nn

import exnorm
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.norms import ExemplarNorm

PLUGIN = ROOT / "examples" / "plugin"
NORM = "# My normalizer\nname: mine\n_target_: exnorm.norms.ExemplarNorm\neps: 1.0e-3\npi: 7\n"
LOAD = """
import sys, torch, exnorm
layer = [layer for layer in exnorm.load(sys.argv[1]).modules() if type(layer).__name__ == "RmsNorm"][0]
layer.reset_parameters()
layer.fused_act = None
x = torch.randn(2, layer.num_features, 5, 5) + 3
expected = x / (x.square().mean((1, 2, 3), keepdim=True) + layer.eps).sqrt()
torch.testing.assert_close(layer(x), expected)
"""


@pytest.fixture(params=["plain", "a folder, with 'signs' \"and\" {more}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with a normalizer, named in EXNORM_CONF."""
    root = tmp_path / request.param
    (root / "norm").mkdir(parents=True)
    (root / "norm" / "mine.yaml").write_text(NORM, encoding="utf-8")
    (root / "norm" / ".#mine.yaml").symlink_to("nobody@nowhere.1")  # the lock of an editor
    monkeypatch.setenv("EXNORM_CONF", str(root))
    return root


def test_a_folder_of_ones_own_has_options(folder: Path, cli_here: CliRunner) -> None:
    """They compose, convert a model, are listed and shown, and have their defaults and their types."""
    assert compose_train(["norm=mine", "norm.pi=9"]).norm == {
        "name": "mine",
        "_target_": "exnorm.norms.ExemplarNorm",
        "eps": 1e-3,
        "pi": 9,
    }
    with pytest.raises(UserError, match=r"norm\.pi=many: expected an integer such as 7"):
        compose_train(["norm=mine", "norm.pi=many"])
    layer = exnorm.convert(nn.Sequential(nn.BatchNorm2d(32)), "mine")[0]
    assert isinstance(layer, ExemplarNorm) and (layer.pi, layer.eps) == (7, 1e-3)
    assert exnorm.convert(nn.Sequential(nn.BatchNorm2d(32)), "mine", pi=5)[0].pi == 5
    assert "mine  My normalizer" in cli_here("list", "norms").stdout
    assert "pi: 7" in cli_here("show", "norm", "mine").stdout


def test_train_takes_options_from_a_folder(folder: Path, tmp_path: Path, run_cli: CliRunner) -> None:
    """`exnorm train` composes in Hydra's own way, also in a sweep; --config-dir names one more folder."""
    other = tmp_path / "other" / "norm"
    other.mkdir(parents=True)
    (other / "yours.yaml").write_text(NORM.replace("mine", "yours"), encoding="utf-8")
    done = run_cli("--config-dir", "other", "train", "norm=mine", "norm.pi=3", "--cfg", "job")
    assert done.returncode == 0 and "pi: 3" in done.stdout, done.stderr
    done = run_cli("--config-dir", "other", "train", "norm=yours", "--cfg", "job")
    assert done.returncode == 0 and "name: yours" in done.stdout, done.stderr
    done = run_cli("train", "--cfg", "job", "norm=mine")
    assert done.returncode == 0 and "name: mine" in done.stdout, done.stderr
    done = run_cli("train", "norm=bn,mine", "-m", "data=digits", "batch=3x")
    assert done.returncode == 2 and "(job 1: norm=mine)" in done.stderr, done.stderr


def test_a_run_has_the_values_of_its_file_and_needs_the_file_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli_here: CliRunner
) -> None:
    """Other values make another run. Without the folder, the run can be loaded and evaluated."""
    (tmp_path / "norm").mkdir()
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    arguments = tiny(make_image_folder(tmp_path / "data"), "norm=mine", "trainer.epochs=1")
    runs = []
    for pi in (7, 9):
        (tmp_path / "norm" / "mine.yaml").write_text(NORM.replace("pi: 7", f"pi: {pi}"), encoding="utf-8")
        runs.append(train_here(arguments, tmp_path / "here"))
    assert runs[0] != runs[1]
    monkeypatch.delenv("EXNORM_CONF")
    for run, pi in zip(runs, (7, 9), strict=True):
        layers = [layer for layer in exnorm.load(run).modules() if isinstance(layer, ExemplarNorm)]
        assert {(layer.pi, layer.eps) for layer in layers} == {(pi, 1e-3)}
    done = cli_here("eval", runs[0])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("norm/other.yaml", NORM, "write name: other, as the file is called; it has name: mine"),
        ("norm/mine.yaml", "name: mine", "write _target_: my_package.MyClass; it has _target_: None"),
        ("norm/mine.yaml", "a: [", "is not valid yaml"),
        ("norm/mine.yaml", "\udc80", "is not valid yaml"),
        ("data/mine.yaml", "name: mine", "write module: my_package.my_set; it has module: None"),
        ("data/mine.yaml", "{name: mine, module: .x}", "write module: my_package.my_set; it has module: .x"),
        ("norm/en.yaml", NORM, "have the same name. Give one of them another name"),
        ("trainer/default.yaml", "epochs: 3", "have the same name. Give one of them another name"),
    ],
)
def test_a_wrong_file_is_one_line(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    with pytest.raises(UserError, match=f"{name}.* {re.escape(said)}"):
        compose_train(["norm=bn"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("logger/mine", "sink: {a: {}}", "unknown key 'logger.sink': did you mean 'logger.sinks'?"),
        ("logger/mine", "csv: yes please", "logger.csv: 'yes please' is not true or false"),
        ("logger/mine", "probe_images: many", "logger.probe_images: 'many' is not an integer"),
        ("logger/mine", "csv: null", "logger.csv: null is not allowed; give a value"),
        ("logger/mine", "csv: ''", "logger.csv: '' is not true or false"),
        ("logger/mine", "sinks: 3", "logger.sinks: Cannot assign int"),
        ("optim/mine", "name: sgd\nlr: |\n  a\n  b\n", "optim.lr: 'a\\nb\\n' is not a number"),
        ("data/mine", "{name: mine, module: my_set, scale: 3}", "data.scale: write a list"),
        ("optim/mine", "name: sgd\nlr: fast", "optim.lr: 'fast' is not a number"),
        ("data/mine", "{name: mine, module: my_set, image_size: big}", "data.image_size: 'big' is not an integer"),
        ("data/mine", "{name: mine, module: my_set, image_siz: 3}", "unknown key 'data.image_siz'"),
    ],
)
def test_a_mistake_inside_a_file_that_is_used_names_file_and_key(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: {re.escape(said)}"):
        compose_train([name.replace("/", "=")])


def test_mistakes_with_folders_are_one_line(tmp_path: Path, run_cli: CliRunner) -> None:
    done = run_cli("--config-dir", "missing", "list", "norms")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"there is no folder {tmp_path.resolve() / 'missing'}" in done.stderr
    done = run_cli("train", "--config-dir=missing", "norm=en")
    assert done.returncode == 2 and "comes before the command: exnorm --config-dir DIR train" in done.stderr
    for name in ("one", "two"):
        (tmp_path / name / "norm").mkdir(parents=True)
        (tmp_path / name / "norm" / "mine.yaml").write_text(NORM, encoding="utf-8")
    done = run_cli("train", "norm=mine", env={"EXNORM_CONF": f"one{os.pathsep}two"})
    assert done.returncode == 2
    assert re.search(r"one/norm/mine.yaml and .*two/norm/mine.yaml have the same name", done.stderr)


def test_a_class_is_a_norm_by_its_full_name(cli_here: CliRunner) -> None:
    config = compose_train(["norm=exnorm.norms.ExemplarNorm", "+norm.pi=3"])
    assert config.norm == {"name": "exnorm.norms.ExemplarNorm", "_target_": "exnorm.norms.ExemplarNorm", "pi": 3}
    layer = exnorm.convert(nn.Sequential(nn.BatchNorm2d(32)), "exnorm.norms.ExemplarNorm", pi=3)[0]
    assert isinstance(layer, ExemplarNorm) and layer.pi == 3
    with pytest.raises(UserError, match=r"norm 'exnorm.norms.Nothing'.* cannot be imported"):
        exnorm.convert(nn.Sequential(nn.BatchNorm2d(32)), "exnorm.norms.Nothing")


def test_a_data_set_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli_here: CliRunner) -> None:
    """Its yaml names its module. Without the module there is one line."""
    values = (ROOT / "conf" / "data" / "imagefolder.yaml").read_text().replace("name: imagefolder", "name: mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(f"{values}module: sets_of_mine.folders\n", encoding="utf-8")
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    images = make_image_folder(tmp_path / "images")
    words = [word for word in tiny(images, "trainer.epochs=1") if not word.startswith("data=")]
    done = cli_here(*words, "data=mine")
    assert done.returncode == 2 and "data=mine: its module sets_of_mine.folders cannot be imported" in done.stderr
    (tmp_path / "modules" / "sets_of_mine").mkdir(parents=True)
    text = "from exnorm.data.sets.imagefolder import fingerprint, load"
    (tmp_path / "modules" / "sets_of_mine" / "folders.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    done = cli_here(*words, "data=mine")
    assert done.returncode == 0 and "runs/mine/test_resnet-en-1x8-" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["norm=my_norms.Missing"], "norm._target_=my_norms.Missing cannot be imported as a class; give module.Class"),
        (["norm=exnorm.norms.BatchNorm", "+norm.alpha=1"], "BatchNorm has no option 'alpha'; allowed: act, affine"),
    ],
)
def test_a_wrong_class_is_one_line(settings: list[str], said: str, tmp_path: Path, cli_here: CliRunner) -> None:
    done = cli_here(*tiny(make_image_folder(tmp_path / "data"), *settings))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_installed_package_brings_a_normalizer_and_a_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: CliRunner
) -> None:
    """The example is built, installed, tested, listed, trained and loaded, and computes what its formula says."""
    site = tmp_path / "site"
    source = shutil.copytree(PLUGIN, tmp_path / "plugin")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, timeout=600)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", str(source)], capture_output=True, text=True)
    assert tested.returncode == 0 and "1 passed" in tested.stdout, tested.stdout
    listed = run_cli("list", "norms")
    assert "rms  RMS normalization" in listed.stdout, listed.stderr
    run = train(tiny(make_image_folder(tmp_path / "data"), "norm=rms", "logger=[csv,latest]"), tmp_path)
    assert json.loads((run / "latest.json").read_text())["epoch"] == 2
    done = subprocess.run([sys.executable, "-c", LOAD, str(run)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

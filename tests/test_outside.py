"""Options from outside: folders of a user, installed packages, and classes by their full name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, CliRunner
from engine_cases import make_image_folder, tiny, train
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
STUDY = "# My study\naxes: {norm: [bn, mine]}\nset: [data=digits]\nseeds: 1\n"


@pytest.fixture(params=["plain", "a folder, with 'signs' \"and\" {more}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with a normalizer and a study, named in EXNORM_CONF."""
    root = tmp_path / request.param
    for name, text in {"norm/mine.yaml": NORM, "study/of-mine.yaml": STUDY}.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("EXNORM_CONF", str(root))
    return root


def test_a_folder_of_ones_own_has_options_and_studies(folder: Path, cli_here: CliRunner) -> None:
    """They compose, convert a model, are listed and shown, and have their defaults and their types."""
    assert compose_train(["norm=mine", "norm.pi=9"]).norm == {
        "name": "mine",
        "_target_": "exnorm.norms.ExemplarNorm",
        "eps": 1e-3,
        "pi": 9,
    }
    with pytest.raises(UserError, match=r"norm\.pi=many: expected an integer such as 7"):
        compose_train(["norm=mine", "norm.pi=many"])
    assert isinstance(exnorm.convert(nn.Sequential(nn.BatchNorm2d(32)), "mine")[0], ExemplarNorm)
    assert "mine  My normalizer" in cli_here("list", "norms").stdout
    assert "pi: 7" in cli_here("show", "norm", "mine").stdout
    plan = cli_here("reproduce", "of-mine", "--plan")
    assert "2 runs; 0 runs done" in plan.stdout, plan.stderr


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


def test_mistakes_with_folders_are_one_line(
    tmp_path: Path, run_cli: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_cli("--config-dir", "missing", "list", "norms")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"there is no folder {tmp_path.resolve() / 'missing'}" in done.stderr
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "en.yaml").write_text(NORM, encoding="utf-8")
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    with pytest.raises(UserError, match=r"norm 'en' is in .*conf/norm/en.yaml and in .*Give one of the files another"):
        compose_train(["norm=en"])


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
def test_an_installed_package_brings_a_normalizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: CliRunner
) -> None:
    """The example is built, installed, listed, trained and loaded, and computes what its formula says."""
    site = tmp_path / "site"
    source = shutil.copytree(PLUGIN, tmp_path / "plugin")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, timeout=300)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    listed = run_cli("list", "norms")
    assert "rms  RMS normalization" in listed.stdout, listed.stderr
    run = train(tiny(make_image_folder(tmp_path / "data"), "norm=rms"), tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(run)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

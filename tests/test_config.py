"""The configuration: every file composes, and every mistake is one line that says what to type."""

import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from exnorm.config import backbones
from exnorm.config.compose import (
    check_options,
    compose_eval,
    compose_train,
    default_values,
    group_options,
    register_model_names,
    split_norm,
)
from exnorm.config.errors import UserError
from exnorm.config.folders import conf_dir
from exnorm.config.groups import groups, option_values

NORMS = ", ".join(group_options("norm"))
OPTIONS = [(group, name) for group in groups() for name in group_options(group)]


@pytest.fixture
def some_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm with two models, so that no test waits for the real one."""
    monkeypatch.setattr(backbones, "timm_names", lambda: ["regnety_008", "vgg11_bn"])


def message(*overrides: str) -> str:
    """Return the one line that a composition fails with."""
    with pytest.raises(UserError) as caught:
        compose_train(list(overrides))
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, name: str) -> None:
    config = compose_train([f"{group}={name}"])
    if group in ("norm", "model", "data"):
        assert config[group].name == name


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_file_opens_with_what_it_is_and_its_command(group: str, name: str) -> None:
    lines = (conf_dir() / group / f"{name}.yaml").read_text().splitlines()
    comments = [line for line in lines[:3] if line.startswith("# ") and "@package" not in line]
    assert len(comments) == 2
    assert comments[1].startswith("# exnorm train ") and group in comments[1]


def test_the_length_of_training_follows_the_data() -> None:
    assert compose_train([]).trainer.epochs == option_values("data", "digits")["epochs"]
    assert compose_train(["data=imagefolder"]).trainer.epochs == 100
    assert compose_train(["data=imagefolder", "trainer.epochs=3"]).trainer.epochs == 3


def test_debug_stands_last_and_the_command_line_after_it() -> None:
    config = compose_train(["debug=fast"])
    assert (config.trainer.epochs, config.model.name, config.runs) == (1, "resnet18", "runs/debug")
    assert config.logger.wandb == "off" and not config.logger.csv
    assert compose_train(["debug=fast", "model=resnet34", "trainer.epochs=2"]).trainer.epochs == 2
    assert compose_train(["debug=fast", "model=resnet34"]).model.name == "resnet34"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("norm=bnn", f"unknown norm 'bnn': did you mean 'bn'? allowed: {NORMS}"),
        ("norm=xyz", f"unknown norm 'xyz': allowed: {NORMS}"),
        ("debug=fats", "unknown debug 'fats': did you mean 'fast'? allowed: fast"),
        ("trainer.epoch=1", "unknown key 'trainer.epoch': did you mean 'trainer.epochs'?"),
        ("nrm=en", "unknown key 'nrm': did you mean 'norm'?"),
        ("+trainer.epoch=1", "unknown key 'trainer.epoch': did you mean 'trainer.epochs'?"),
        ("lr=0.1", "unknown key 'lr': did you mean 'optim.lr'?"),
        ("norm.pie=3", "unknown key 'norm.pie': did you mean 'norm.pi'?"),
        ("+norm.pie=3", "unknown key 'norm.pie' for norm en: did you mean 'pi'?"),
        ("norm.num_groups=3", "unknown key 'norm.num_groups' for this norm: gn has it"),
        ("trainer.epochs=abc", "trainer.epochs=abc is not an integer, such as trainer.epochs=100"),
        ("optim.lr=x", "optim.lr=x is not a number"),
        ("trainer.compile=3x", "trainer.compile=3x is not true or false, such as trainer.compile=false"),
        ("data.scale=3", "data.scale=3 is not a list, such as data.scale=[0.08,1.0]"),
        ("seed=null", "seed=null: null is not allowed; give a value, such as seed=0"),
        ("norm.pi=abc", "norm.pi=abc: expected an integer such as 50"),
        ("norm.sync=1", "norm.sync=1: expected true or false"),
        ("norm.normalizers=in", "norm.normalizers=in: expected a list such as [in,ln,bn]"),
        ("norm.normalizers=[1]", "norm.normalizers=[1]: expected a list such as [in,ln,bn]"),
        ("~norm", "no norm is chosen. Type for example norm=en; exnorm list norms shows all of them"),
        ("norm=bn,sn", "norm=bn,sn has several values. Add -m to run one after the other"),
        ("data.root=${nope}", "data.root: Interpolation key 'nope' not found"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_word(override: str, line: str) -> None:
    assert message(override) == line


@pytest.mark.parametrize("override", ["batch=(8,32)", "norm", "norm.normalizers=[in", "trainer=3"])
def test_what_cannot_be_parsed_is_one_line_with_an_example(override: str) -> None:
    assert "such as" in message(override)


def test_a_float_takes_an_integer_and_a_null_default_anything() -> None:
    compose_train(["norm.eps=1", "norm.initial=bn"])
    with pytest.raises(UserError, match="expected an integer"):
        check_options("norm", {"name": "en", "pi": True})


def test_any_model_of_timm_is_an_option(some_timm: None) -> None:
    assert compose_train(["model=regnety_008"]).model.name == "regnety_008"
    assert compose_train(["model=regnety_008.pycls_in1k", "model.drop_rate=0.5"]).model.drop_rate == 0.5
    assert message("model=regnety_009") == "unknown model 'regnety_009': did you mean 'regnety_008'? allowed: " + (
        "regnety_008, resnet101, resnet18, resnet18_small, resnet34, resnet50, resnet_mini, resnet_small, "
        "shufflenet_v2_x0_5, shufflenet_v2_x1_0, vgg11_bn"
    )


def test_a_sweep_over_models_registers_each(some_timm: None) -> None:
    assert backbones.requested("model", ["model=resnet18,vgg11_bn", "norm=bn,sn"]) == ["resnet18", "vgg11_bn"]
    assert backbones.requested("model", ["model=glob(*)", "model=(", "model=choice(a,b)"]) == ["a", "b"]
    backbones.register_requested(["model=resnet18,vgg11_bn"])
    register_model_names(["resnet18"])  # its yaml stays the only one
    stored = ConfigStore.instance().list("model")
    assert "vgg11_bn.yaml" in stored and "resnet18.yaml" not in stored


def test_the_list_of_timm_is_read_in_another_process_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backbones.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(backbones, "LIST_MODELS", "print('a\\nb')")
    assert backbones.timm_names() == ["a", "b"]
    assert [file.name for file in (tmp_path / "exnorm").iterdir()] == ["timm-9.9.txt"]
    monkeypatch.setattr(backbones, "LIST_MODELS", "raise SystemExit(1)")
    assert backbones.timm_names() == ["a", "b"]
    monkeypatch.setattr(backbones.metadata, "version", lambda name: "10")
    with pytest.raises(UserError, match="timm 10 cannot list its models"):
        backbones.timm_names()


def test_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").write_text("a file where the folder should be")
    monkeypatch.setattr(backbones, "cache_folder", lambda: tmp_path / "full")
    monkeypatch.setattr(backbones, "LIST_MODELS", "print('a')")
    monkeypatch.setattr(backbones.metadata, "version", lambda name: "9.9")
    assert backbones.timm_names() == ["a"]
    assert "warning" in capsys.readouterr().err


def test_an_evaluation_takes_the_data_of_the_run_unless_told_otherwise() -> None:
    own = {"name": "imagefolder", "root": "A", "image_size": 160}
    assert compose_eval(own, []).data.root == "A"
    moved = compose_eval(own, ["data.root=B"]).data
    assert (moved.root, moved.image_size) == ("B", 160)
    other = compose_eval(own, ["data=digits"]).data
    assert (other.name, other.root, other.image_size) == (
        "digits",
        None,
        160,
    )  # the crops that the model was trained on
    assert compose_eval(own, ["data=digits", "data.image_size=32"]).data.image_size == 32


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("chekpoint=best", "unknown key 'chekpoint': did you mean 'checkpoint'?"),
        ("devices=x", "devices=x is not an integer, such as devices=1"),
        ("+trainer.epochs=3", "unknown key 'trainer.epochs': did you mean 'data.epochs'?"),
    ],
)
def test_an_evaluation_explains_mistakes_too(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_eval({"name": "digits"}, [override])
    assert str(caught.value) == line


def test_defaults_cover_every_key_but_the_name_of_the_norm() -> None:
    defaults = default_values("sn")
    assert defaults["norm"]["normalizers"] == ["in", "ln", "bn"] and "name" not in defaults["norm"]
    config = OmegaConf.to_container(compose_train(["norm=sn"]), resolve=True)
    assert isinstance(config, dict) and set(config) == set(defaults)


def test_a_norm_splits_into_name_class_and_options() -> None:
    name, target, options = split_norm(compose_train(["norm=gn"]).norm)
    assert (name, target, options) == ("gn", "exnorm.norms.GroupNorm", {"eps": 1e-5, "num_groups": 32})


def test_a_wheel_brings_its_own_conf(tmp_path: Path) -> None:
    """The package's own `conf` goes before the checkout's."""
    import shutil
    import subprocess

    import exnorm

    package = Path(exnorm.__file__).parent
    shutil.copytree(package / "config", tmp_path / "exnorm" / "config")
    shutil.copytree(conf_dir(), tmp_path / "exnorm" / "conf")
    shutil.copy(package / "__init__.py", tmp_path / "exnorm")
    code = "from exnorm.config import compose, folders; compose.compose_train([]); print(folders.conf_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path.resolve() / "exnorm" / "conf"

"""`exnorm export`: what is written is the trained model, for programs that have no exnorm, and it is checked."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from conftest import ROOT, CliRunner, varied
from engine_cases import environment, last_state, make_image_folder, tiny, train_here
from norm_cases import NORMS
from PIL import Image
from torch import Tensor, nn

import exnorm
from exnorm import ops
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.data.transforms import eval_transform
from exnorm.engine.checkpoint import read_weights
from exnorm.export import weights, write
from exnorm.export.check import CheckFailed, batches, compare, sample
from exnorm.export.exported import Exported
from exnorm.export.write import FORMATS, export
from exnorm.models import build_network, load_weights
from exnorm.tasks import make_task

torch.set_num_threads(1)
slow = pytest.mark.slow
CLASSES = ["cat", "dog", "elk"]
LINE = re.compile(
    r"(\S+): \d+\.\d MB(, opset 20)?\. On (.+) the logits differ by at most (\S+) \(largest logit: (\S+)\), and "
    r"(\S+)% of the most likely classes are equal\n"
)
# Exporters of torch 2.15 call deprecated functions of torch.
exporting = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# Runs the lines of a file after making sure that a package cannot be imported.
WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    """The back end is what it was afterwards."""
    before = ops.get_backend()
    yield
    ops.set_backend(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three colours."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "data", val=25)


@pytest.fixture(scope="module")
def run_of_en(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EN whose ratios have left 1/3."""
    return train_here(tiny(data, "norm=en", "optim.lr=0.3", "trainer.epochs=1"), tmp_path_factory.mktemp("en"))


def unlike(model: nn.Module) -> nn.Module:
    """A model in which no value is that of its start, in evaluation mode."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "fc2_weight", "mean_weight", "var_weight")):
            tensor.normal_()
        elif tensor.is_floating_point() and tensor.ndim < 3 and name != "progress":
            tensor.add_(0.2 * torch.randn_like(tensor))
    return model.eval()


def exported(*words: str, size: int = 32, data: str = "digits") -> Exported:
    """A model that was not trained, with the config of its run."""
    config = compose_train([f"data={data}", "model=resnet18", "logger=off", *words])
    task = make_task(config.task, CLASSES)
    model = unlike(build_network(task.network, config.model, config.norm))
    description = {"class_names": json.dumps(CLASSES), "num_classes": "3"}
    return Exported(model, config, description, torch.randn(2, 3, size, size))


def one_by_one(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of images that the model sees one at a time."""
    with torch.no_grad():
        return torch.cat([model(image[None]) for image in images])


def needs(form: str) -> None:
    """Skip the test if the packages of a format are missing."""
    for name in FORMATS[form].packages:
        pytest.importorskip(name)


@slow
@exporting
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
@pytest.mark.parametrize("norm", varied(NORMS, always=["en"]))
def test_every_norm_is_exported_and_each_image_has_its_own_result(norm: str, form: str, tmp_path: Path) -> None:
    """In batches of 1, 7 and 3 the logits are those of single images, and no path of this machine is in the file."""
    needs(form)
    given = exported("model.name=test_resnet", f"norm={norm}", size=64)
    path = tmp_path / FORMATS[form].name
    FORMATS[form].write(given, path)
    run = FORMATS[form].read(path).run
    images = torch.randn(11, 3, 64, 64)
    expected = one_by_one(given.model, images)
    assert expected.std() > 0.05, "a network whose logits are all alike shows nothing"
    got = torch.cat([run(part) for part in images.split([1, 7, 3])])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert str(ROOT).encode() not in path.read_bytes()


@slow
@exporting
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_what_an_exporter_refuses_is_one_line(form: str, tmp_path: Path) -> None:
    """Here a network that cannot take an image of 32 px at all."""
    needs(form)
    with pytest.raises(UserError, match=r"cannot export model=resnet18 norm=in \(InstanceNorm needs more than 1 pos"):
        FORMATS[form].write(exported("model=resnet18", "norm=in"), tmp_path / FORMATS[form].name)


@slow
@exporting
@pytest.mark.parametrize("norm", varied(["bn", "en"], always=["en"]))
def test_a_resnet18_is_exported_to_onnx(norm: str, tmp_path: Path) -> None:
    """Stem, residuals and strides of a network as people have it, at 64 px."""
    needs("onnx")
    given = exported(f"norm={norm}", size=64)
    FORMATS["onnx"].write(given, tmp_path / "model.onnx")
    loaded = FORMATS["onnx"].read(tmp_path / "model.onnx")
    assert loaded.note == ", opset 20"
    found = compare(loaded.run, given.model, batches(torch.randn(8, 3, 64, 64), None))
    assert found.difference < 1e-4 * found.logit and found.same_class == 1


@slow
@exporting
@pytest.mark.parametrize(
    ("head", "form"),
    varied(
        itertools.product(["fcn", "psp"], ["onnx", "torch_export"]),
        always=[("fcn", "torch_export"), ("psp", "onnx")],
    ),
)
def test_a_segmentation_network_takes_images_of_any_size(form: str, head: str, tmp_path: Path) -> None:
    needs(form)
    keep = ["model.keep=[head.branches.bin1.*]"] if head == "psp" else []
    given = exported("task=segmentation", "model=resnet_mini", f"model.head={head}", "norm=en", *keep, data="camvid")
    path = tmp_path / FORMATS[form].name
    FORMATS[form].write(replace(given, example=torch.randn(2, 3, 64, 48)), path)
    run = FORMATS[form].read(path).run
    for height, width in ((64, 48), (32, 32), (97, 131)):
        images = torch.randn(3, 3, height, width)
        torch.testing.assert_close(run(images), one_by_one(given.model, images), rtol=1e-3, atol=1e-4)


@slow
def test_an_exported_program_runs_without_exnorm(tmp_path: Path) -> None:
    """In a process in which exnorm cannot be imported, and with the description beside it."""
    given = exported("model.name=test_resnet", "norm=sn")
    FORMATS["torch_export"].write(given, tmp_path / "model.pt2")
    torch.save(given.example, tmp_path / "images.pt")
    lines = """
import torch
extra = {"exnorm.json": ""}
model = torch.export.load("model.pt2", extra_files=extra).module()
torch.save((model(torch.load("images.pt")), extra["exnorm.json"]), "logits.pt")
assert "exnorm" not in sys.modules
"""
    run_lines(WITHOUT + lines, "exnorm", cwd=tmp_path)
    logits, text = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, one_by_one(given.model, given.example))
    assert json.loads(text) == given.description
    (inputs,), _ = torch.export.load(tmp_path / "model.pt2").example_inputs
    assert torch.equal(inputs, given.example)


def test_an_export_contains_no_image_of_the_data_set(run_of_en: Path, tmp_path: Path) -> None:
    """An exported program holds its example inputs."""
    given: list[Exported] = []

    def spy(exported: Exported, path: Path) -> None:
        given.append(exported)
        path.touch()

    broken = {"torch_export": replace(FORMATS["torch_export"], write=spy)}
    with mock.patch.dict(write.FORMATS, broken), pytest.raises(CheckFailed):
        export(run_of_en, "torch_export")
    (one,) = given
    pixels = sample(one.config, make_task(one.config.task, last_state(run_of_en)["classes"])).images
    assert one.example.shape == (2, *pixels.shape[1:])
    assert not any(torch.equal(example, image) for example in one.example for image in pixels)


def run_lines(lines: str, *arguments: str, cwd: Path) -> None:
    """Run Python code in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", lines, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@slow
@exporting
@pytest.mark.parametrize("form", FORMATS)
def test_the_command_writes_and_checks_a_run(form: str, run_of_en: Path, cli_here: CliRunner) -> None:
    """On 64 images of the validation set; what is written says how to prepare images and what the classes are."""
    needs(form)
    done = cli_here("export", run_of_en, "--format", form)
    assert done.returncode == 0, done.stderr
    match = LINE.fullmatch(done.stdout)
    assert match, done.stdout
    path = Path(match[1])
    assert path == run_of_en / "export" / FORMATS[form].name
    assert match[3] == "64 validation images of imagefolder" and bool(match[2]) == (form == "onnx")
    assert float(match[4]) < 1e-4 * float(match[5]) and match[6] == "100.00"
    assert {entry.name for entry in path.parent.iterdir()} <= {chosen.name for chosen in FORMATS.values()}
    said = said_in(path)
    assert said["class_names"] == CLASSES and said["num_classes"] == 3
    assert said["preprocessing"] == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "resize": 32,
        "crop": 32,
        "interpolation": "bilinear",
    }
    assert said["run"] in run_of_en.name and said["exnorm_version"] == exnorm.__version__
    assert said["model"]["name"] == "test_resnet" and said["norm"]["name"] == "en"
    refused = cli_here("export", run_of_en, "--format", form)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"exnorm: error: {path} exists. Remove it, or type --out PATH to write to another place\n"
    )


def said_in(path: Path) -> dict[str, Any]:
    """The description in an exported file."""
    if path.is_dir():
        return said_in(path / "model.safetensors")
    if path.suffix == ".onnx":
        import onnxruntime

        texts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    elif path.suffix == ".pt2":
        extra = {"exnorm.json": ""}
        torch.export.load(path, extra_files=extra)
        texts = json.loads(extra["exnorm.json"])
    else:
        with safetensors.safe_open(path, framework="pt") as opened:
            texts = opened.metadata()
    plain = ("format", "exnorm_version", "run", "step", "running_statistics")
    return {key: text if key in plain else json.loads(text) for key, text in texts.items()}


def test_weights_keep_their_names_and_make_the_model_again(run_of_en: Path, tmp_path: Path) -> None:
    """For `exnorm.load`, for `model.init_from`, and with random images for the check if the data are gone."""
    file = tmp_path / "w.safetensors"
    with mock.patch("exnorm.export.check.load", side_effect=UserError("gone")):
        assert "On 64 random images, because data=imagefolder cannot be read (gone), the" in export(
            run_of_en, "safetensors", out=file
        )
    model, again = exnorm.load(run_of_en), exnorm.load(file)
    state = safetensors.torch.load_file(file)
    assert state.keys() == model.state_dict().keys()
    assert {"fc.weight", "layer1.0.bn1.fc2_weight", "layer1.0.bn1.running_var"} <= state.keys()
    assert not again.training
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) and torch.equal(value, state[name])
    target = exported("model.name=test_resnet", "norm=en").model
    assert load_weights(target, read_weights(file), source=file) == []
    assert torch.equal(target.state_dict()["fc.weight"], state["fc.weight"])


@slow
def test_a_file_of_weights_starts_a_run(run_of_en: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    export(run_of_en, "safetensors", out=file)
    words = tiny(data, "norm=en", "optim.lr=0", "optim.weight_decay=0", "trainer.steps=1", f"model.init_from={file}")
    state = last_state(train_here(words, tmp_path / "next"))["model"]
    assert torch.equal(state["fc.weight"], safetensors.torch.load_file(file)["fc.weight"])


def test_what_is_no_export_is_one_line(run_of_en: Path, tmp_path: Path) -> None:
    """A file of somebody else, one that is cut, and one that names a class that is no task."""
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, file)
    with pytest.raises(UserError, match="exnorm export did not write it. Build the model, and load these weights"):
        exnorm.load(file)
    file.unlink()
    export(run_of_en, "safetensors", out=file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"w.safetensors cannot be read as weights"):
        exnorm.load(file)
    file.write_bytes(content)
    with safetensors.safe_open(file, framework="pt") as opened:
        texts = opened.metadata()
    named = texts["task"].replace(json.loads(texts["task"])["_target_"], "subprocess.Popen")
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=texts | {"task": named})
    with pytest.raises(UserError, match=r"task._target_=subprocess.Popen is not a subclass of exnorm.tasks.Task"):
        exnorm.load(file)


@slow
def test_the_lines_of_the_readme_make_the_model(tmp_path: Path) -> None:
    """In a new process, with options of the norm, layers that are kept, and a network that exnorm adds to timm."""
    words = ("model=resnet_small", "norm=sn", "norm.normalizers=[in,ln]", "model.keep=[stem.bn]")
    given = exported(*words, size=32)
    folder = tmp_path / "hub"
    FORMATS["hf"].write(given, folder)
    text = (folder / "README.md").read_text()
    assert "exnorm.convert(model, 'sn', keep=('stem.bn',), normalizers=['in', 'ln'])" in text
    torch.save(given.example, folder / "images.pt")
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    run_lines(f'{lines}\nimport torch\ntorch.save(model(torch.load("images.pt")), "logits.pt")', cwd=folder)
    torch.testing.assert_close(torch.load(folder / "logits.pt"), one_by_one(given.model, given.example))


def test_timm_prepares_images_as_the_run_did(tmp_path: Path) -> None:
    """The folder says nothing of timm about other weights, and its transform gives the same pixels."""
    given = exported(
        "model.name=test_resnet", "norm=bn", "data.image_size=40", "data.resize=53", "data.mean=[0.1,0.2,0.3]"
    )
    FORMATS["hf"].write(given, tmp_path / "hub")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'hub'}")
    assert model.pretrained_cfg["label_names"] == CLASSES and model.num_classes == 3
    assert not {"license", "tag", "origin_url"} & model.pretrained_cfg.keys()
    settings = timm.data.resolve_data_config(model=model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    own, theirs = eval_transform(given.config.data), timm.data.create_transform(**settings)
    assert callable(theirs)
    pixels, *_ = own(image)
    torch.testing.assert_close(theirs(image), own.normalize(pixels[None])[0], rtol=1e-4, atol=1e-4)


def test_timm_alone_loads_a_network_with_bn(tmp_path: Path) -> None:
    """BN has the parameters of timm's layer; those of other norms are refused, not left out."""
    given = {norm: exported("model.name=test_resnet", f"norm={norm}") for norm in ("bn", "sn", "gn")}
    for norm, each in given.items():
        FORMATS["hf"].write(each, tmp_path / norm)
    model = timm.create_model(f"local-dir:{tmp_path / 'bn'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one_by_one(model, images), one_by_one(given["bn"].model, images), rtol=1e-4, atol=1e-5)
    for norm in ("sn", "gn"):
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
            timm.create_model(f"local-dir:{tmp_path / norm}", pretrained=True)


@pytest.mark.parametrize(("word", "data"), [("task=segmentation", "camvid"), ("model=shufflenet_v2_x0_5", "digits")])
def test_a_network_that_timm_cannot_build_is_no_hub_folder(word: str, data: str, tmp_path: Path) -> None:
    given = exported("norm=bn", word, data=data)
    with pytest.raises(UserError, match="timm cannot build the network of .*Type --format safetensors"):
        FORMATS["hf"].write(given, tmp_path / "hub")


@slow
def test_calibrated_statistics_are_exported(data: Path, tmp_path: Path) -> None:
    """Those of `trainer.inference=batch_average`, with which the run was validated."""
    words = ("norm=bn", "trainer.inference=batch_average", "trainer.calibration_batches=2", "trainer.epochs=1")
    run = train_here(tiny(data, *words), tmp_path)
    export(run, "safetensors", out=tmp_path / "w.safetensors")
    state, name = last_state(run), "bn1.running_var"
    values = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(values[name], state["calibrated"][name]) and not torch.equal(values[name], state["model"][name])
    assert said_in(tmp_path / "w.safetensors")["running_statistics"] == "batch_average"


def cut(exported: Exported, path: Path) -> None:
    """Write half of a file."""
    weights.write_safetensors(exported, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong(exported: Exported, path: Path) -> None:
    """Write one layer with other values."""
    state = {name: value.clone() for name, value in exported.model.state_dict().items()}
    state["bn1.running_var"] *= 1.2
    path.write_bytes(safetensors.torch.save(state, metadata=exported.description))


def full(exported: Exported, path: Path) -> None:
    """Write a part of a file, and find that the disk is full."""
    path.write_bytes(b"begun")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("writer", "code", "line"),
    [
        (
            cut,
            1,
            r"w.safetensors was not written: it cannot be read back \(.*w.safetensors cannot be read as weights.*",
        ),
        (wrong, 1, r"w.safetensors was not written: its logits differ by up to \S+, where the largest is \S+"),
        (full, 2, r"w.safetensors: No space left on device"),
    ],
)
def test_a_wrong_file_gets_no_name_and_one_line(
    writer: Callable[[Exported, Path], None], code: int, line: str, run_of_en: Path, tmp_path: Path, cli_here: CliRunner
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    broken = {"safetensors": replace(FORMATS["safetensors"], name="w.safetensors", write=writer)}
    with mock.patch.dict(write.FORMATS, broken):
        done = cli_here("export", run_of_en, "--format", "safetensors", "--out", "out/w.safetensors")
    assert done.returncode == code and done.stdout == ""
    assert re.fullmatch(rf"exnorm: error: out/{line}\n", done.stderr), done.stderr
    assert list(folder.iterdir()) == []


def test_a_network_is_checked_with_the_sizes_that_it_takes() -> None:
    """Two batch sizes; with free sizes two widths, and none that is too small."""
    images = torch.zeros(64, 3, 40, 40)
    assert [len(batch) for batch in batches(images[:1], None)] == [1]
    for smallest, width in ((None, 40), (16, 30), (32, 32)):
        shapes = [tuple(batch.shape) for batch in batches(images, smallest)]
        assert shapes == [(1, 3, 40, width), *[(7, 3, 40, 40)] * 9]


def test_logits_that_are_not_finite_or_of_another_shape_do_not_agree() -> None:
    model = nn.Linear(3, 2)
    images = torch.ones(9, 3)
    for run, said in ((lambda x: model(x) * torch.nan, "differ"), (lambda x: model(x)[:1], "returns logits of shape")):
        with pytest.raises(CheckFailed, match=said):
            compare(run, model, iter([images]))


def test_mistakes_are_one_line(run_of_en: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    empty, begun = tmp_path / "empty", tmp_path / "begun"
    empty.mkdir(), begun.mkdir()
    (begun / "config.yaml").write_bytes((run_of_en / "config.yaml").read_bytes())
    (tmp_path / "there.onnx").touch()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    for arguments, line in (
        ((empty, "--format", "hf"), "is not a run folder: it has no config.yaml. Type exnorm runs to list runs"),
        ((tmp_path / "none", "--format", "hf"), "does not exist. See exnorm export --help"),
        ((begun, "--format", "hf"), "has no checkpoint that can be read. Train first"),
        ((run_of_en, "--format", "tflite"), "'tflite' is not one of 'onnx', 'torch_export', 'safetensors', 'hf'"),
        ((run_of_en,), "Missing option '--format'"),
        ((run_of_en, "--format", "hf", "--out", "new", "--checkpoint", "first.pt"), "there is no checkpoint first.pt"),
        (
            (run_of_en, "--format", "hf", "--out", "new", "--checkpoint", "weights.pt"),
            "weights.pt is not a checkpoint of a run",
        ),
        ((run_of_en, "--format", "torch_export", "--out", "a.onnx"), "give the name of a file that ends with .pt2"),
        ((run_of_en, "--format", "safetensors", "--out", "no/a.safetensors"), "there is no folder no"),
        ((run_of_en, "--format", "hf", "--out", "no/a"), "no/a: there is no folder no"),
        ((run_of_en, "--format", "hf", "--out", "empty"), "empty exists. Remove it, or type --out PATH"),
    ):
        done = cli_here("export", *arguments)
        assert done.returncode == 2 and done.stdout == "" and line in done.stderr, done.stderr
        assert done.stderr.startswith("exnorm: error: ") and done.stderr.count("\n") == 1


def test_a_missing_package_is_told_before_any_work(cli_here: CliRunner, tmp_path: Path) -> None:
    """Even before the run is looked for."""
    with mock.patch.object(write, "find_spec", lambda name: None if name == "onnxscript" else object()):
        done = cli_here("export", tmp_path, "--format", "onnx")
    assert done.returncode == 2 and done.stderr == (
        "exnorm: error: the format onnx needs onnx, onnxscript and onnxruntime. Type pip install 'exnorm[export]'\n"
    )

"""`exnorm.fold`: the folded model is the same function, and what cannot be folded stays and says why."""

import copy
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import timm.layers
import torch
from conftest import CliRunner, varied
from engine_cases import make_image_folder, tiny, train_here
from torch import Tensor, nn
from torch.nn.utils import prune

import exnorm
from exnorm import ops
from exnorm.config.errors import UserError
from exnorm.export import fold as command
from exnorm.norms import (
    BatchNorm,
    BatchRenorm,
    BatchScopeNorm,
    ExemplarNorm,
    GroupNorm,
    Norm,
    SparseSwitchNorm,
    SwitchNorm,
)
from exnorm.ops import ACTIVATIONS
from exnorm.surgery.folded import Folded

torch.set_num_threads(1)
slow = pytest.mark.slow
# Exporters of torch 2.15 call deprecated functions of torch.
exporting = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CHANNELS = 6
KINDS: dict[str, Callable[..., Norm]] = {
    "bn": BatchNorm,
    "bn, cumulative": lambda c, **o: BatchNorm(c, momentum=None, **o),
    "brn": BatchRenorm,
    "hard sn": lambda c, **o: SwitchNorm(c, hard=True, initial="bn", **o),
    "hard sn in groups": lambda c, **o: SwitchNorm(c, hard=True, initial="bn", groups=3, **o),
    "sn of bn": lambda c, **o: SwitchNorm(c, normalizers=("bn",), **o),
    "saturated sn": lambda c, **o: saturated(SwitchNorm(c, normalizers=("bn", "ln"), **o)),
    "ssn at the end": lambda c, **o: sparse(SparseSwitchNorm(c, initial="bn", **o)),
    "en of bn": lambda c, **o: ExemplarNorm(c, normalizers=("bn",), reduction=2, pi=2, **o),
}


def saturated(norm: SwitchNorm) -> SwitchNorm:
    """SN whose softmax is exactly 1 for BN."""
    nn.init.constant_(norm.mean_weight[:1], 2000.0)
    nn.init.constant_(norm.var_weight[:1], 2000.0)
    return norm


def sparse(norm: SparseSwitchNorm) -> SparseSwitchNorm:
    """SSN at the end of a training."""
    norm.progress.fill_(1)
    return norm


def trained(model: nn.Module) -> nn.Module:
    """The model with running statistics and affine parameters as after a training, in evaluation mode."""
    for norm in model.modules():
        if isinstance(norm, Norm):
            for value in (norm.weight, norm.bias):
                if value is not None:
                    nn.init.uniform_(value, -1.5, 1.5)
        if isinstance(norm, BatchScopeNorm) and norm.running_mean is not None and norm.running_var is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 3)
    return model.eval()


class Cell(nn.Module):
    """A convolution and its norm, with a residual from another convolution if there is one."""

    def __init__(self, layer: nn.Module, norm: nn.Module, side: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm, self.side = layer, norm, side

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) if self.side is None else self.norm(self.layer(x), self.side(x))


def random_cell(draw: random.Random, kind: str) -> tuple[nn.Module, Tensor]:
    """A cell of any convolution, options, activation and residual, with an input."""
    spatial, transposed = draw.choice((0, 0, 1, 2, 2, 2, 3)), draw.random() < 0.4
    options: dict[str, Any] = {"act": draw.choice((None, *ACTIVATIONS)), "affine": draw.random() < 0.8}
    bias = draw.random() < 0.5
    if spatial > 0 and kind == "hard sn in groups":
        options["unbiased"] = True
    if spatial == 0:
        shape = draw.choice(((5, 4), (2, 3, 4)))
        layers = [nn.Linear(4, CHANNELS, bias=bias) for _ in range(2)]
        options["channel_dim"] = 1 if len(shape) == 2 else -1
    else:
        groups = draw.choice((1, 2, CHANNELS))
        inputs = groups * draw.choice((1, 2)) if groups == 2 else max(groups, 3)
        stride = draw.choice((1, 2))
        geometry: dict[str, Any] = {
            "kernel_size": 3,
            "stride": stride,
            "padding": draw.choice((0, 1)),
            "groups": groups,
        }
        if transposed:
            geometry["output_padding"] = stride - 1
        else:
            geometry["padding_mode"] = draw.choice(("zeros", "reflect", "circular"))
        name = f"Conv{'Transpose' if transposed else ''}{spatial}d"
        layers = [getattr(nn, name)(inputs, CHANNELS, bias=bias, **geometry) for _ in range(2)]
        shape = (2, inputs, *(5,) * spatial)
    cell = Cell(layers[0], KINDS[kind](CHANNELS, **options), layers[1] if draw.random() < 0.4 else None)
    return trained(cell), torch.randn(shape)


@torch.no_grad()
def difference(model: nn.Module, folded: nn.Module, x: Tensor) -> float:
    """The largest difference of the outputs, as a share of the largest output."""
    expected, got = model(x), folded(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_a_folded_layer_is_the_same_function(kind: str, seed: int) -> None:
    """Of random convolutions, linear layers, options, activations and residuals; float32 has more rounding."""
    torch.manual_seed(seed)
    model, x = random_cell(random.Random(f"{seed} {kind}"), kind)
    for dtype, allowed in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        whole = copy.deepcopy(model).to(dtype)
        folded = exnorm.fold(copy.deepcopy(whole))
        assert isinstance(folded.norm, Folded) and folded.layer.weight.dtype == dtype
        assert difference(whole, folded, x.to(dtype)) < allowed


def resnet18(**options: Any) -> nn.Module:
    """A converted ResNet-18 for three classes."""
    torch.manual_seed(0)
    return exnorm.convert(timm.create_model("resnet18", num_classes=3), **options)


@pytest.mark.parametrize("options", [{"norm": "bn"}, {"norm": "sn", "hard": True, "initial": "bn"}])
@pytest.mark.parametrize("fuse", [True, False])
def test_every_layer_of_a_resnet18_is_folded(options: dict[str, Any], fuse: bool) -> None:
    """With residuals and activations inside the layers, and with modules of their own; copies and files too."""
    model = trained(resnet18(fuse=fuse, **options)).double()
    folded = exnorm.fold(copy.deepcopy(model))
    rows = exnorm.audit(folded)
    assert len(rows) == 20 and not any(isinstance(module, Norm) for module in folded.modules())
    assert rows[0].original.endswith("BatchNorm2d") and rows[0].reason == "folded into conv1"
    assert {row.name: row.reason for row in rows}["layer2.0.downsample.1"] == "folded into layer2.0.downsample.0"
    assert all(row.replacement is not None and row.replacement.startswith("Folded(") for row in rows)
    assert "freeze" not in str(rows)
    images = torch.randn(2, 3, 48, 48).double()
    assert difference(model, folded, images) < 1e-10
    stream = io.BytesIO()
    torch.save(folded, stream)
    stream.seek(0)
    for again in (copy.deepcopy(folded), torch.load(stream, weights_only=False), folded.train()):
        assert difference(model, again, images) < 1e-10


def test_layers_that_depend_on_the_input_stay() -> None:
    """The audit says so, and counts both."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), BatchNorm(6, act="relu"), nn.Conv2d(6, 6, 3), GroupNorm(6, num_groups=2)
    ).append(SwitchNorm(6, initial="bn"))
    folded = exnorm.fold(copy.deepcopy(trained(model)))
    depends = "built; not folded: its scale and shift depend on the input"
    assert [row.reason for row in exnorm.audit(folded)] == ["folded into 0", depends, depends]
    assert difference(model, folded, torch.randn(2, 3, 9, 9)) < 1e-5


class Reads(nn.Module):
    """What `read` does with a cell."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.read = layer, norm, read
        self.first, self.own = nn.Conv2d(6, 6, 1), BatchNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.first(self.read(self, x)))  # one layer that can be folded


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, padding=1, **options)


def tied(module: Any) -> Any:
    """The module with another convolution of the same weight."""
    module.other = conv()
    module.other.weight = module.layer.weight
    return module


def pruned() -> nn.Conv2d:
    """A convolution whose weight is computed before each forward; copies take only tensors without a gradient."""
    layer = prune.random_unstructured(conv(), "weight", 0.5)
    layer.weight = layer.weight.detach()
    return layer


def with_drop(norm: Norm) -> Norm:
    norm.drop = nn.Dropout()
    return norm


def hooked(module: nn.Module) -> Any:
    module.register_forward_hook(lambda module, args, y: y + 1)
    return module


def through(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.layer(x))


def as_residual(m: Any, x: Tensor) -> Tensor:
    y = m.layer(x)
    return m.norm(y, y)


ELSEWHERE = "the output of layer is also used elsewhere"
NOTHING_BEFORE = "there is no convolution or linear layer directly before it"
STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "read by an addition": (lambda: Reads(lambda m, x: (y := m.layer(x)) + m.norm(y), conv(), BatchNorm(6)), ELSEWHERE),
    "its own residual": (lambda: Reads(as_residual, conv(), BatchNorm(6)), ELSEWHERE),
    "an operation between": (
        lambda: Reads(lambda m, x: m.norm(m.layer(x).exp()), conv(), BatchNorm(6)),
        NOTHING_BEFORE,
    ),
    "an input": (lambda: Reads(lambda m, x: m.norm(x), conv(), BatchNorm(6)), NOTHING_BEFORE),
    "another layer": (lambda: Reads(through, nn.ReLU(), BatchNorm(6)), NOTHING_BEFORE),
    "called twice": (
        lambda: Reads(lambda m, x: m.norm(m.layer(x)) + m.norm(m.layer(x)), conv(), BatchNorm(6)),
        "the trace of the model calls it 2 times, not once",
    ),
    "not called": (lambda: Reads(lambda m, x: m.layer(x), conv(), BatchNorm(6)), "calls it 0 times, not once"),
    "convolution called twice": (
        lambda: Reads(lambda m, x: m.norm(m.layer(m.layer(x))), conv(), BatchNorm(6)),
        "layer is called 2 times",
    ),
    "weight read in the trace": (
        lambda: Reads(lambda m, x: through(m, x) * m.layer.weight[0, 0, 0, 0], conv(), BatchNorm(6)),
        "the weight of layer is also used elsewhere",
    ),
    "weight given to a function": (
        lambda: Reads(lambda m, x: torch.conv2d(through(m, x), m.layer.weight, padding=1), conv(), BatchNorm(6)),
        "the weight of layer is also used elsewhere",
    ),
    "bias read": (
        lambda: Reads(lambda m, x: through(m, x) + m.layer.bias.mean(), conv(), BatchNorm(6)),
        "the bias of layer is also used elsewhere",
    ),
    "weight read from a list": (
        lambda: Reads(lambda m, x: through(m, x) + next(m.layer.parameters()).mean(), conv(), BatchNorm(6)),
        "the weight of layer is also used elsewhere",
    ),
    "tied weight": (
        lambda: tied(Reads(lambda m, x: m.other(through(m, x)), conv(), BatchNorm(6))),
        "the weight of layer is also used elsewhere",
    ),
    "standardized weight": (
        lambda: Reads(through, timm.layers.ScaledStdConv2d(6, 6, 3, padding=1), BatchNorm(6)),
        "layer is a ScaledStdConv2d, whose formula is not known",
    ),
    "parametrized weight": (
        lambda: Reads(through, nn.utils.parametrizations.weight_norm(conv()), BatchNorm(6)),
        "layer has hooks, or a weight that is computed",
    ),
    "pruned weight": (
        lambda: Reads(through, pruned(), BatchNorm(6)),
        "layer has hooks, or a weight that is computed",
    ),
    "hooked convolution": (lambda: Reads(through, hooked(conv()), BatchNorm(6)), "layer has hooks, or a weight"),
    "hooked norm": (lambda: Reads(through, conv(), hooked(BatchNorm(6))), "it has hooks"),
    "channels last": (
        lambda: Reads(lambda m, x: through(m, x)[..., :4, :4], conv(), BatchNorm(6, channel_dim=-1)),
        "it normalizes another dimension than the channels of layer",
    ),
    "batch statistics": (
        lambda: Reads(through, conv(), BatchNorm(6, track_running_stats=False)),
        "its scale and shift depend on the input",
    ),
    "ratios of two": (
        lambda: Reads(through, conv(), SwitchNorm(6, initial="bn")),
        "its scale and shift depend on the input",
    ),
    "hard ratios on IN": (
        lambda: Reads(through, conv(), SwitchNorm(6, hard=True, initial="in")),
        "its scale and shift depend on the input",
    ),
    "a drop before a residual": (
        lambda: Reads(lambda m, x: m.norm(m.layer(x), x), conv(), with_drop(BatchNorm(6, act="gelu"))),
        "it adds a residual and has an activation module",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_cannot_be_folded_stays_with_its_reason(case: str) -> None:
    build, reason = STAYS[case]
    torch.manual_seed(0)
    model = trained(build())
    norm = model.get_submodule("norm")
    folded = exnorm.fold(copy.deepcopy(model))
    row = next(row for row in exnorm.audit(folded) if row.name == "norm")
    assert reason in row.reason and isinstance(folded.norm, type(norm)), row
    assert any(isinstance(module, Folded) for module in folded.modules())
    assert difference(model, folded, torch.randn(2, 6, 6, 6)) < 1e-5


class Branches(nn.Module):
    """A model whose forward depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), BatchNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), BatchNorm(6)).train(), "call model.eval() first"),
        (lambda: nn.Conv2d(3, 6, 3), "nothing to fold: the model has no layer of exnorm; call exnorm.convert"),
        (lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 6, 3), BatchNorm(6))), "fold the bare model first"),
        (lambda: Branches().eval(), "torch.fx cannot trace this model (symbolically traced variables cannot be"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 3), ExemplarNorm(6, reduction=3)).eval(),
            "nothing to fold: its scale and shift depend on the input (1 layer)",
        ),
        (lambda: nn.Sequential(nn.ReLU(), BatchNorm(6)).eval(), f"nothing to fold: {NOTHING_BEFORE} (1 layer)"),
    ],
)
def test_what_is_refused_is_one_line_and_changes_nothing(build: Callable[[], nn.Module], line: str) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as raised:
        exnorm.fold(model)
    assert line in str(raised.value) and "\n" not in str(raised.value)
    assert not any(isinstance(module, Folded) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_linear_layer_whose_channels_become_ambiguous_is_an_error() -> None:
    """Its norm took the second dimension, which is not the features' if there are three."""
    folded = exnorm.fold(trained(nn.Sequential(nn.Linear(4, 6), BatchNorm(6))))
    assert folded(torch.randn(5, 4)).shape == (5, 6)
    with pytest.raises(UserError, match="the BatchNorm folded into 0 takes inputs of 2 dimensions, not"):
        folded(torch.randn(5, 6, 4))


def test_weights_keep_their_dtype_format_and_gradients() -> None:
    """A new bias learns if the weight does."""
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), BatchNorm(6))).to(
        torch.bfloat16, memory_format=torch.channels_last
    )
    model[0].weight.requires_grad_(False)
    weight = model[0].weight
    exnorm.fold(model)
    assert model[0].weight is weight and weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].bias.dtype == torch.bfloat16 and not model[0].bias.requires_grad


@slow
@pytest.mark.parametrize(
    "name",
    varied(
        ["mobilenetv3_small_050", "tf_efficientnet_b0", "res2net50_14w_8s", "densenet121"],
        always=["mobilenetv3_small_050", "densenet121"],
    ),
)
def test_networks_of_timm(name: str) -> None:
    """Depthwise convolutions, TF's padding, splits; in a DenseNet many layers come before their convolution."""
    torch.manual_seed(0)
    model = trained(exnorm.convert(timm.create_model(name, num_classes=3), "bn")).double()
    folded = exnorm.fold(copy.deepcopy(model))
    left = sum(isinstance(module, Norm) for module in folded.modules())
    assert left == (62 if name == "densenet121" else 0)
    assert difference(model, folded, torch.randn(2, 3, 64, 64).double()) < 1e-10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three colours."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "data", val=25)


@pytest.fixture(scope="module")
def run_of_bn(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of BN with averaged weights."""
    words = ("norm=bn", "trainer.ema=0.9", "optim.lr=0.3", "trainer.epochs=1")
    return train_here(tiny(data, *words), tmp_path_factory.mktemp("bn"))


AGREES = (
    r"On 64 validation images of imagefolder the logits differ by at most (\S+) \(largest logit: (\S+)\), and 100\.00% "
    r"of the most likely classes are equal\n"
)
LINES = re.compile(
    rf"(?P<folded>\d+) of (?P<all>\d+) layers are folded\. {AGREES}"
    r"Inference of 8 images of 32 x 32 px takes (?P<before>\S+) ms before and (?P<after>\S+) ms after, "
    r"(?P<ratio>\S+) of the time \(medians of 11 alternating rounds; .+; back end eager\)\n"
    rf"(?P<path>\S+): \d+\.\d MB(?:, opset 20)?\. {AGREES}\Z"
)


@slow
def test_the_command_folds_a_run(run_of_bn: Path, run_cli: CliRunner) -> None:
    """The file is the model that `exnorm.load` returns, with its averaged weights, and it names the folded layers."""
    done = run_cli("fold", run_of_bn, env={"OMP_NUM_THREADS": "1", "EXNORM_BACKEND": "eager"})
    assert done.returncode == 0, done.stderr
    model = exnorm.load(run_of_bn)
    norms = [name for name, module in model.named_modules() if isinstance(module, Norm)]
    found = LINES.search(done.stdout)
    assert found, done.stdout
    assert int(found["folded"]) == int(found["all"]) == len(norms)
    assert float(found[3]) < 1e-4 * float(found[4])
    assert min(float(found[key]) for key in ("before", "after", "ratio")) > 0
    table = done.stdout.splitlines()
    assert table[0].split() == ["layer", "is", "now", "why"] and len(table) == len(norms) + 4
    for line, name in zip(table[1:], norms, strict=False):
        assert re.fullmatch(rf"{name} +Folded\(BatchNorm(, act='relu')?\) +folded into \S+ *", line), line
    assert Path(found["path"]) == run_of_bn / "export" / "folded.pt2"
    extra = {"exnorm.json": ""}
    program = torch.export.load(found["path"], extra_files=extra)
    assert json.loads(json.loads(extra["exnorm.json"])["folded"]) == norms
    assert not any("bn1" in name for name in program.state_dict), "the statistics are in the convolutions"
    assert difference(model, program.module(), torch.randn(5, 3, 32, 32)) < 1e-4
    again = run_cli("fold", run_of_bn)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr == (
        f"exnorm: error: {found['path']} exists. Remove it, or type --out PATH to write to another place\n"
    )


@slow
@exporting
def test_the_command_writes_onnx(run_of_bn: Path, cli_here: CliRunner) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with ops.using_backend("eager"):
        done = cli_here("fold", run_of_bn, "--format", "onnx", "--out", "small.onnx")
    assert done.returncode == 0, done.stderr
    found = LINES.search(done.stdout)
    assert found and found["path"] == "small.onnx", done.stdout
    nodes = {node.op_type for node in onnx.load("small.onnx").graph.node}
    assert "Conv" in nodes and not nodes & {"Sqrt", "Reciprocal", "Sub", "Mul"}, "no layer computes its coefficients"


def test_a_run_without_a_constant_layer_is_one_line(data: Path, tmp_path: Path, cli_here: CliRunner) -> None:
    run = train_here(tiny(data, "norm=en", "trainer.epochs=1"), tmp_path)
    done = cli_here("fold", run)
    assert done.returncode == 2 and done.stdout == ""
    line = r"exnorm: error: nothing to fold: its scale and shift depend on the input \(\d+ layers\)\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def wrongly(model: nn.Module) -> Any:
    """The folded model with another classifier."""
    with torch.no_grad():
        exnorm.fold(model).fc.weight.mul_(1.1)
    return model


def test_outputs_that_differ_are_one_line(run_of_bn: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    with mock.patch.object(command, "fold", wrongly):
        done = cli_here("fold", run_of_bn, "--out", "folded.pt2")
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "folded.pt2").exists()
    assert re.fullmatch(r"exnorm: error: the folded model .*its logits differ by up to \S+, where .*\n", done.stderr)


def test_mistakes_are_one_line(run_of_bn: Path, cli_here: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "there.pt2").touch()
    for arguments, line in (
        ((tmp_path,), "is not a run folder: it has no config.yaml"),
        ((tmp_path / "none",), "does not exist. See exnorm fold --help"),
        ((run_of_bn, "--format", "safetensors"), "'safetensors' is not one of 'torch_export', 'onnx'"),
        ((run_of_bn, "--checkpoint", "first.pt", "--out", "a.pt2"), "there is no checkpoint first.pt"),
        ((run_of_bn, "--out", "there.pt2"), "there.pt2 exists. Remove it"),
        ((run_of_bn, "--out", "a.onnx"), "give the name of a file that ends with .pt2"),
    ):
        done = cli_here("fold", *arguments)
        assert done.returncode == 2 and done.stdout == "" and line in done.stderr, done.stderr
        assert done.stderr.startswith("exnorm: error: ") and done.stderr.count("\n") == 1

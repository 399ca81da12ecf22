"""Converted models afterwards: refused and repeated conversions, freezing, calibrating, synchronizing, folding, FX."""

import copy
import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import timm.utils
import torch
import torchvision
from timm.layers import is_notrace_module
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import exnorm
from exnorm.models import load_weights
from exnorm.norms import BatchNorm, BatchScopeNorm, ExemplarNorm, GroupNorm, Norm, SwitchNorm
from exnorm.surgery import audit, audit_rows, convert, layers
from exnorm.testing.layers import assert_same, randomize, state

torch.set_num_threads(1)


def images(count: int = 4) -> Tensor:
    """Images of 64 pixels."""
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    """A ResNet of timm with values as after training."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module)
    return model


def structure(model: nn.Module) -> list[tuple[str, type[nn.Module], tuple[str, ...]]]:
    """Names, types and attributes of all modules."""
    return [(name, type(module), tuple(vars(module))) for name, module in model.named_modules()]


class Groups(nn.Module):
    """A residual block around a layer of exnorm, which a conversion would fuse, and nothing of torch to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.block = timm.create_model("test_resnet", norm_layer=BatchNorm)

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


def test_a_refused_conversion_leaves_the_model_untouched() -> None:
    """No residual is fused where there is nothing to replace."""
    model = Groups()
    before = structure(model)
    with pytest.raises(ValueError, match="nothing to replace: there is no layer of kind group"):
        convert(model, "gn", replace=("group",))
    assert structure(model) == before


@pytest.mark.parametrize("given", [nn.InstanceNorm2d, nn.BatchNorm2d(3), 7])
def test_what_is_no_normalizer_of_exnorm_is_refused_in_a_line(given: Any) -> None:
    """The message says what convert takes."""
    with pytest.raises(ValueError, match=r"is not a normalizer of exnorm; convert takes a subclass .* or a name: bn, "):
        convert(resnet(), given)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("torch.nn.InstanceNorm2d", "is not a normalizer of exnorm"),
        ("nowhere.Norm", "cannot be imported"),
        ("Norm", "cann"),
    ],
)
def test_a_target_that_is_no_normalizer_is_refused_in_a_line(
    target: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the file to mend."""
    monkeypatch.setattr(layers, "group_options", lambda group: ["mine"])
    monkeypatch.setattr(layers, "option_values", lambda group, name: {"_target_": target})
    with pytest.raises(ValueError, match=rf"{problem}.*_target_ in norm/mine\.yaml"):
        convert(resnet(), "mine")


@pytest.mark.parametrize("fuse", [True, False])
def test_a_converted_model_can_be_converted_again(fuse: bool) -> None:
    """Trained as BN, then EN that starts as that network: activations and residuals stay where they went."""
    model = convert(resnet(), "bn")
    want = copy.deepcopy(model).eval()(images())
    count = sum(isinstance(m, Norm) for m in model.modules())
    convert(model, "en", initial="bn", fuse=fuse)
    assert sum(type(m) is ExemplarNorm for m in model.modules()) == count
    torch.testing.assert_close(model.eval()(images()), want, rtol=1e-2, atol=1e-2)
    assert all("BatchNorm2d" in row.original for row in audit(model))
    assert_same(state(convert(copy.deepcopy(model), "en")), state(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"has a weight for each normalizer.*convert the original model"):
        convert(model, "sn")
    assert sum(type(m) is ExemplarNorm for m in model.modules()) == count


def test_options_of_a_converted_layer_are_handed_on() -> None:
    """As those of torch's layers: eps, momentum, sync, tracking, layout, mode and what is fused."""
    first = convert(nn.Sequential(nn.SyncBatchNorm(6, eps=1e-3, momentum=0.2)), "bn")
    norm = convert(first, "sn").get_submodule("0")
    assert isinstance(norm, SwitchNorm) and (norm.eps, norm.momentum, norm.sync) == (1e-3, 0.2, True)
    layer = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU())
    convert(layer, "ln", replace=("layer",))
    convert(layer, "gn", replace=("layer",), num_groups=3)
    assert isinstance(layer[1], GroupNorm) and (layer[1].channel_dim, layer[1].fused_act) == (-1, "gelu")


def test_frozen_batch_norms_are_named() -> None:
    """In the message and in the audit, with what to do."""
    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(6))
    with pytest.raises(ValueError, match=r"kinds: none; FrozenBatchNorm2d \(1\): its statistics are frozen; convert"):
        convert(model, "en")
    assert "unfreeze_batch_norm_2d" in audit(model)[0].reason


def test_the_audit_says_how_to_treat_the_layers() -> None:
    """Printed, it is a line for each layer, and names what takes the place of functions that skip them."""
    text = str(audit(convert(resnet(), "en")))
    assert len(text.splitlines()) == len(audit(convert(resnet(), "en"))) + 1
    assert all(f"exnorm.{name}" in text for name in ("freeze", "recalibrate", "convert_sync"))
    assert audit_rows.NOTE not in str(audit(resnet()))


@pytest.mark.parametrize("norm", ["bn", "sn", "en", "gn"])
def test_a_frozen_layer_stays_as_it_is(norm: str) -> None:
    """Through `train()`, a training step and a copy; other layers learn on."""
    model = exnorm.freeze(convert(resnet(), norm))
    norms = [m for m in model.modules() if isinstance(m, Norm)]
    before = [state(m) for m in norms]
    want = copy.deepcopy(model).eval()(images())
    torch.testing.assert_close(copy.deepcopy(model).train()(images()), want)
    model.train()(images()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    for module, values in zip(norms, before, strict=True):
        assert_same(state(module), values, rtol=0, atol=0)
    assert next(model.parameters()).grad is not None, "the first convolution"


def test_frozen_layers_are_not_moved_by_a_commit() -> None:
    """In a training of the engine too, the count of batches included."""
    model = exnorm.freeze(convert(resnet(), "bn"))
    before = state(model)
    exnorm.norms.configure_scope(model, replicas=2)
    model.train()(images())
    exnorm.norms.commit_running_stats(model)
    assert_same(state(model), before, rtol=0, atol=0)


def test_recalibrated_statistics_are_those_of_update_bn() -> None:
    """The mean over batches, as torch does it for its own layers; modes and momentum stay."""
    batches = [(images(6)[:2], 0), (images(6)[2:4], 1), (images(6)[4:], 2)]
    stock, model = resnet().eval(), convert(resnet(), "bn").eval()
    momentum = [m.momentum for m in model.modules() if isinstance(m, BatchScopeNorm)]
    torch.optim.swa_utils.update_bn(batches, stock)
    assert exnorm.recalibrate(model, batches, device="cpu") is model
    assert_same(state(model), state(stock), rtol=1e-3, atol=1e-4)
    assert not any(module.training for module in model.modules())
    assert momentum == [m.momentum for m in model.modules() if isinstance(m, BatchScopeNorm)]
    own = resnet()
    assert_same(state(exnorm.recalibrate(own, batches)), state(stock), rtol=1e-5, atol=1e-6)


def test_a_recalibration_that_cannot_be_leaves_the_statistics() -> None:
    """No batches, a batch that the model refuses, no layer with statistics."""
    model = convert(resnet(), "en")
    before = state(model)
    with pytest.raises(ValueError, match="loader without batches"):
        exnorm.recalibrate(model, [])
    with pytest.raises(RuntimeError):
        exnorm.recalibrate(model, [images(), images()[:, :2]])
    assert_same(state(model), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="found no layer with running statistics, or all such layers are frozen"):
        exnorm.recalibrate(exnorm.freeze(model), [images()])


def test_synchronization_can_be_asked_for_later() -> None:
    """Every layer with BN's scope; what several processes then compute is in the tests of the scope."""
    model = exnorm.convert_sync(convert(resnet(), "sn"))
    found = [m.sync for m in model.modules() if isinstance(m, BatchScopeNorm)]
    assert found and all(found)


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "efficientvim_m1"])
@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_folding_a_converted_model_is_refused(name: str, norm: str) -> None:
    """timm would compute another function from the running statistics, without a word."""
    model = convert(timm.create_model(name, num_classes=5), norm)
    before = structure(model)
    with pytest.raises(ValueError, match=r"would fold a batch normalization.*reparameterize the model before"):
        timm.utils.reparameterize_model(model)
    assert structure(model) == before
    copy.deepcopy(model)


@pytest.mark.parametrize("build", [lambda: torchvision.models.resnet18(num_classes=5), resnet])
@pytest.mark.parametrize("norm", ["en", "ssn"])
def test_features_can_be_extracted_from_a_converted_model(build: Any, norm: str) -> None:
    """torchvision's tracer sees one call for each norm, under its name, as before the conversion."""
    model = convert(build(), norm).eval()
    extractor = create_feature_extractor(model, ["layer1", "layer2.0.bn1"])
    found = extractor(images())
    seen: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, __: Any, y: Tensor) -> None:
        seen[name] = y.clone()  # torchvision's ReLU overwrites it

    for name in found:
        model.get_submodule(name).register_forward_hook(functools.partial(note, name))
    model(images())
    assert_same(found, seen, rtol=1e-5, atol=1e-6)


def test_norms_are_leaves_for_timms_tracer() -> None:
    """`convert` registers the class, as timm does for its own layers."""
    convert(resnet(), ExemplarNorm)
    assert is_notrace_module(ExemplarNorm)


def test_a_distilled_models_two_heads_start_anew() -> None:
    """Both classifiers of a distilled DeiT may have another number of classes."""
    make = lambda classes: timm.create_model(  # noqa: E731
        "deit_tiny_distilled_patch16_224", num_classes=classes, depth=1, img_size=32
    )
    notes = load_weights(make(3), make(5).state_dict(), source="a file")
    assert sorted(note.split()[1] for note in notes) == [
        f"{head}.{name}" for head, name in itertools.product(("head", "head_dist"), ("bias", "weight"))
    ]


def test_packages_are_there_after_import_exnorm() -> None:
    """README writes `exnorm.ops.set_backend`; importing exnorm itself imports no torch."""
    code = "import sys, exnorm; assert 'torch' not in sys.modules; print(exnorm.ops.set_backend('eager'), exnorm.norms)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("eager <module 'exnorm.norms'"), done.stderr

"""Backbones, weights from elsewhere, and the papers' optimizer."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import exnorm
from exnorm.analysis.ratios import as_metrics, mean_ratios, measure_ratios
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.engine.checkpoint import read_weights
from exnorm.models import build_network, classifier, load_weights
from exnorm.models.backbones import features
from exnorm.norms import ExemplarNorm, Norm
from exnorm.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from exnorm.surgery import convert


def build(norm: str = "en", name: str = "test_resnet", classes: int = 3, **model: Any) -> nn.Module:
    """A small converted backbone."""
    config = compose_train(["model=resnet18", f"model.name={name}", f"norm={norm}"])
    for key, value in model.items():
        config.model[key] = value
    return build_network(partial(classifier, num_classes=classes), config.model, config.norm)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "shufflenet_v2_x0_5"])
def test_backbones_of_timm_and_torchvision_train_with_en(name: str) -> None:
    model = build(name=name)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert any(isinstance(module, ExemplarNorm) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="test_resnet"):
        build(name="test_resnt")


def test_weights_of_a_bn_network_go_to_every_normalizer_of_en() -> None:
    source, target = build("bn"), build("en")
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    notes = load_weights(target, source.state_dict(), source="somewhere")
    for (name, old), new in zip(source.named_modules(), target.modules(), strict=True):
        if isinstance(old, Norm):
            assert isinstance(new, Norm)
            assert torch.equal(new.weight, old.weight.expand_as(new.weight)), name
            assert torch.equal(new.running_var, old.running_var)
    assert any("start anew" in note for note in notes)


def test_a_layer_keeps_its_own_eps_and_momentum_unless_others_are_chosen() -> None:
    """tf_efficientnet has eps 1e-3, without which its pretrained weights are another network."""
    model = build("bn", name="tf_efficientnet_b0", options={"bn_momentum": 0.01})
    assert isinstance(model.bn1, Norm)
    assert (model.bn1.eps, model.bn1.momentum) == (1e-3, 0.01)
    config = compose_train(["model=resnet18", "model.name=tf_efficientnet_b0", "norm=bn", "norm.eps=1e-4"])
    assert build_network(partial(classifier, num_classes=3), config.model, config.norm).bn1.eps == 1e-4


@pytest.mark.parametrize("legacy", [True, False])
def test_weights_of_the_published_sn_code_load(legacy: bool, tmp_path: Path) -> None:
    """(1, C, 1, 1), saved from DataParallel, in the file format of its time or of ours."""
    source, target = build("sn"), build("sn")
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = {}
    for name, value in source.state_dict().items():
        wide = isinstance(source.get_submodule(name.rpartition(".")[0]), Norm) and name.endswith(("weight", "bias"))
        wide = wide and not name.endswith(("mean_weight", "var_weight"))
        state[f"module.{name}"] = value.reshape(1, -1, 1, 1) if wide else value
    torch.save(state, tmp_path / "sn.pth", _use_new_zipfile_serialization=not legacy)
    load_weights(target, read_weights(tmp_path / "sn.pth"), source="sn.pth")
    for (name, value), other in zip(source.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("content", "words"), [(b"no weights", "cannot be read as weights"), (None, "does not hold weights but a list")]
)
def test_a_file_without_weights_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(content) if content else torch.save([1], file)
    with pytest.raises(UserError, match=words):
        read_weights(file)


def test_a_classifier_of_other_classes_starts_anew_and_is_said() -> None:
    source, target = build(classes=3), build(classes=5)
    before = target.fc.weight.clone()
    notes = load_weights(target, source.state_dict(), source="somewhere")
    assert torch.equal(target.fc.weight, before)
    assert torch.equal(target.conv1[0].weight, source.conv1[0].weight)
    assert any("fc.weight" in note for note in notes)


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(UserError, match="another architecture"):
        load_weights(build(), build(name="test_efficientnet").state_dict(), source="somewhere")


def rates(epochs: int, steps: int, **options: Any) -> list[float]:
    """The rate at every step of a training with 256 samples per step."""
    config = compose_train(["optim=sgd", "optim.schedule=step"]).optim
    for key, value in options.items():
        config[key] = value
    return [learning_rate(config, step=step, steps=epochs * steps, total_batch=256) for step in range(epochs * steps)]


def test_the_papers_rate_falls_tenfold_at_epochs_30_60_and_90_of_100() -> None:
    values = rates(100, 2)
    expected = [0.1] * 60 + [0.01] * 60 + [0.001] * 60 + [0.0001] * 20
    assert values == pytest.approx(expected)


def test_the_rate_scales_with_the_batch_unless_it_is_given() -> None:
    config = compose_train(["optim=sgd", "optim.schedule=step"]).optim
    given = compose_train(["optim=sgd", "optim.schedule=step", "optim.lr=0.3"]).optim
    common = {"step": 0, "steps": 1, "total_batch": 32}
    assert learning_rate(config, **common) == pytest.approx(0.0125)
    assert learning_rate(given, **common) == 0.3


def test_cosine_falls_from_the_peak_to_zero_after_a_linear_warm_up() -> None:
    values = rates(10, 10, schedule="cosine", warmup=0.2)
    assert values[:20] == pytest.approx([0.1 * step / 20 for step in range(20)])
    assert values[20:] == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 80)) for t in range(80)])


def test_weight_decay_reaches_every_parameter() -> None:
    """With zero gradients one step is w - lr * wd * w, for weights and norms alike."""
    model = build()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    config = compose_train(["optim=sgd"]).optim
    optimizer = build_optimizer(model, config, total_batch=256)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, torch.full_like(parameter, 1 - 0.1 * 1e-4)), name


def test_poly_falls_from_the_peak_to_zero_by_its_power() -> None:
    values = rates(10, 10, schedule="poly", power=0.9, warmup=0.2)
    assert values[:20] == pytest.approx([0.1 * step / 20 for step in range(20)])
    assert values[20:] == pytest.approx([0.1 * (1 - t / 80) ** 0.9 for t in range(80)])


@pytest.mark.parametrize("norm", ["bn", "en", "ssn"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_can_be_left_to_convolutions_and_linear_layers(norm: str, name: str) -> None:
    model = build(norm)
    config = compose_train([f"optim={name}", "optim.decay=weights", "optim.weight_decay=0.1"]).optim
    groups = build_optimizer(model, config, total_batch=256).param_groups
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays.keys() == set(model.parameters())
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            decayed = key == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            assert decays[parameter] == (0.1 if decayed else 0.0), f"{path}.{key}"


class WithHead(nn.Module):
    """A backbone and two heads, each with a norm."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.backbone = build(norm)
        self.head = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), norm)
        self.aux_head = convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), norm)


def groups_of(model: nn.Module, rate: float, *options: str) -> dict[nn.Parameter, dict[str, Any]]:
    """The group of each parameter in a step of this rate, with a weight decay of 0.5."""
    config = compose_train(["optim=sgd", "optim.weight_decay=0.5", *options]).optim
    optimizer = build_optimizer(model, config, total_batch=256)
    set_learning_rate(optimizer, rate)
    found = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(dict(found)) == len(list(model.parameters()))
    return dict(found)


@pytest.mark.parametrize("norm", ["bn", "ssn"])
@pytest.mark.parametrize("decay", ["all", "weights"])
def test_heads_have_a_rate_of_their_own_times_that_of_their_norms(norm: str, decay: str) -> None:
    """Their weight decay is that of the backbone's layers."""
    model = WithHead(norm)
    found = groups_of(model, 0.02, "optim.head_lr_scale=10", f"optim.decay={decay}")
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ratios = name in ("mean_weight", "var_weight")
            scale = (1 if path.startswith("backbone.") else 10) * (0.1 if ratios else 1)
            assert found[parameter]["lr"] == pytest.approx(0.02 * scale), path
            weight = name == "weight" and not isinstance(module, Norm)
            decayed = not ratios and (weight or decay == "all")
            assert found[parameter]["weight_decay"] == (0.5 if decayed else 0), path


@pytest.mark.parametrize(("name", "heads"), [("test_resnet", ["fc"]), ("deit_tiny_distilled_patch16_224", ["head"])])
def test_the_head_of_a_classification_network_is_its_classifier(name: str, heads: list[str]) -> None:
    model = timm.create_model(name, num_classes=3)
    found = groups_of(model, 0.1, "optim.head_lr_scale=10")
    fast = {path.partition(".")[0] for path, parameter in model.named_parameters() if found[parameter]["lr"] > 0.5}
    assert fast == {*heads, *(["head_dist"] if "distilled" in name else [])}


def test_a_scale_of_one_leaves_the_groups_as_they_were() -> None:
    """Bit-equality of older runs: the same groups, with the same keys and the parameters in the same order."""
    model = build("ssn")
    named = dict(model.named_parameters())
    ratios = [name for name in named if name.endswith(("mean_weight", "var_weight"))]
    usual, own = parameter_groups(model, 0.1, head_lr_scale=1.0)
    assert usual.keys() == {"params"} and own.keys() == {"params", "lr", "lr_scale", "weight_decay"}
    for group, names in ((usual, [name for name in named if name not in ratios]), (own, ratios)):
        assert [id(parameter) for parameter in group["params"]] == [id(named[name]) for name in names]


def test_a_frozen_head_has_no_rate() -> None:
    model = WithHead("bn")
    model.head.requires_grad_(False)
    groups = parameter_groups(model, 0.1, head_lr_scale=10)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


@pytest.mark.parametrize("scale", ["0", "-1"])
def test_a_rate_of_the_heads_that_is_not_above_zero_is_refused(scale: str) -> None:
    config = compose_train(["optim=sgd", f"optim.head_lr_scale={scale}"]).optim
    with pytest.raises(UserError, match=rf"optim\.head_lr_scale={scale} is not possible; give a number above 0"):
        build_optimizer(build(), config, total_batch=256)


def test_an_unknown_optimizer_is_refused() -> None:
    unknown = SimpleNamespace(name="sdg", schedule="step", lr=1.0, decay="all", head_lr_scale=1.0)
    with pytest.raises(UserError, match="did you mean 'sgd'"):
        build_optimizer(nn.Linear(1, 1), unknown, total_batch=1)


@pytest.mark.parametrize("norm", ["sn", "en"])
def test_measured_ratios_of_every_layer_sum_to_one_and_leave_no_trace(norm: str) -> None:
    model = build(norm).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rows = measure_ratios(model, torch.randn(4, 3, 32, 32))
    layers = {name for name, module in model.named_modules() if isinstance(module, Norm)}
    assert {row.layer for row in rows} == layers
    for layer in layers:
        for ratio in {row.ratio for row in rows}:
            shares = [row.mean for row in rows if row.layer == layer and row.ratio == ratio]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert sum(mean_ratios(rows).values()) == pytest.approx(1, abs=1e-5)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    keys = as_metrics(rows)
    assert ("ratio/conv1.1/in" in keys) if norm == "en" else ("ratio/conv1.1/mean/in" in keys)


def test_resnet18_small_has_the_blocks_of_a_resnet18() -> None:
    """Two blocks a stage with the channels of timm's resnet18, so they differ in the first convolution alone."""
    ours, timms = (
        classifier(compose_train([f"model={name}"]).model, num_classes=10) for name in ("resnet18_small", "resnet18")
    )
    shapes = [
        sorted(tuple(weight.shape) for weight in model.parameters() if weight.dim() == 4 and weight.shape[1] > 3)
        for model in (ours, timms)
    ]
    assert shapes[0] == shapes[1]


def test_resnet_small_keeps_16_pixels_and_serves_both_tasks() -> None:
    """Its blocks have 16, 8, 4 and 2 positions a side; segmentation dilates it; there are no weights to download."""
    config = compose_train(["model=resnet_small", "data=digits", "model.options.channels=[8,16,24,32]"]).model
    model: Any = classifier(config, num_classes=7)
    sides: dict[int, Any] = {}
    for place, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda module, args, output, place=place: sides.update({place: output.shape[1:]}))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert {place: tuple(shape) for place, shape in sides.items()} == {
        0: (8, 16, 16),
        1: (16, 8, 8),
        2: (24, 4, 4),
        3: (32, 2, 2),
    }
    dilated = features(config, output_stride=8, count=2)
    assert [tuple(of.shape[1:]) for of in dilated(torch.zeros(1, 3, 32, 32))] == [(24, 4, 4), (32, 4, 4)]
    assert {key.replace("stages_", "stages.") for key in dilated.state_dict()} <= set(model.state_dict())
    config.pretrained = True
    with pytest.raises(UserError, match="No pretrained weights exist for exnorm_resnet_small"):
        classifier(config, num_classes=7)


def test_the_table_of_ratios_has_those_of_every_image_and_group() -> None:
    """EN's are those of each image alone; SN's are one set for all images, or one for each group of channels."""
    images = torch.randn(3, 3, 32, 32)
    model = build("en").train()
    for module in model.modules():
        if isinstance(module, Norm):
            nn.init.normal_(module.fc2_weight)
    model.get_submodule("layer1").eval()
    modes = [module.training for module in model.modules()]
    table = exnorm.ratios(model, images)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert set(table.image) == {0, 1, 2} and set(table.kind) == {"lambda"} and table.group.isna().all()
    assert table.groupby(["layer", "image"]).ratio.sum().to_numpy() == pytest.approx(1, abs=1e-5)
    alone = exnorm.ratios(model, images[1:2])
    assert alone.ratio.to_numpy() == pytest.approx(table[table.image == 1].ratio.to_numpy(), abs=1e-5)
    assert not np.allclose(table[table.image == 0].ratio, table[table.image == 1].ratio, atol=1e-3)

    grouped = exnorm.ratios(convert(timm.create_model("test_resnet"), "sn", groups=2), images)
    assert set(grouped.group) == {0, 1} and grouped.image.isna().all()
    assert grouped.groupby(["layer", "kind", "group"]).ratio.sum().to_numpy() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="no layer of this model mixes normalizers"):
        exnorm.ratios(build("bn"), images)
    with pytest.raises(RuntimeError):
        exnorm.ratios(model, torch.randn(1, 4, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())

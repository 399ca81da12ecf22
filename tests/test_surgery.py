"""Surgery: what a model keeps when its normalization layers are replaced, and what is refused."""

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.distributed as dist
import torchvision
from norm_cases import NORMS
from timm.models.densenet import DenseNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import exnorm
from exnorm.norms import BatchNorm, BatchScopeNorm, ExemplarNorm, GroupNorm, LayerNorm, Norm, SwitchNorm
from exnorm.ops import ACTIVATIONS
from exnorm.surgery import KINDS, AuditRow, audit, constructor_options, convert, norm_class
from exnorm.surgery.pairs import activation_name, following_activations
from exnorm.testing.layers import assert_same, randomize, state

torch.set_num_threads(1)


def tiny_resnetv2(**options: Any) -> nn.Module:
    """A pre-activation ResNet of four blocks."""
    layers: dict[str, Any] = {"conv_layer": timm.layers.create_conv2d, **options}
    return ResNetV2(layers=[1, 1, 1, 1], channels=(32, 32, 64, 64), num_classes=5, **layers)


def timm_model(name: str) -> Callable[[], nn.Module]:
    """A builder of a timm model with five classes."""
    return lambda: timm.create_model(name, num_classes=5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": timm_model("test_resnet"),
    "regnet": timm_model("regnetx_002"),
    "efficientnet": timm_model("test_efficientnet"),
    "mobilenetv3": timm_model("mobilenetv3_small_050"),
    "densenet": lambda: DenseNet(growth_rate=8, block_config=(2, 2), num_classes=5),
    "resnetv2": lambda: tiny_resnetv2(norm_layer=timm.layers.BatchNormAct2d),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
}
every_model = pytest.mark.parametrize("model_name", MODELS)


def trained(model_name: str, seed: int = 0) -> nn.Module:
    """A model in float64 whose norm layers have random affine and running values, as after training."""
    torch.manual_seed(seed)
    model = MODELS[model_name]().double()
    for module in model.modules():
        if type(module) in KINDS["batch"]:
            randomize(module, seed)
    return model


def images(seed: int = 0) -> Tensor:
    """Four images of 64 pixels."""
    return torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of the input and the parameters, and the state afterwards."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    found = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found, **state(model)}


@every_model
@pytest.mark.parametrize("fuse", [True, False])
def test_conversion_to_bn_changes_nothing(model_name: str, fuse: bool) -> None:
    """Output, every gradient, running statistics and state-dict keys, in training and in evaluation.

    Covers the activation and drop of norm-act layers: without them the output would differ.
    """
    original = trained(model_name)
    converted = convert(copy.deepcopy(original), "bn", fuse=fuse)
    assert not [m for m in converted.modules() if type(m) in KINDS["batch"]]
    for training in (True, False):
        want = outcome(original.train(training), images())
        assert_same(outcome(converted.train(training), images()), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model_name", ["regnet", "densenet", "resnetv2", "efficientnet", "mobilenetv3"])
def test_activations_of_norm_act_layers_are_fused_only_on_request(model_name: str) -> None:
    """fuse=True moves the activation into the layer, fuse=False keeps it as a module."""
    fused = [m for m in convert(MODELS[model_name](), "en").modules() if isinstance(m, Norm)]
    apart = [m for m in convert(MODELS[model_name](), "en", fuse=False).modules() if isinstance(m, Norm)]
    assert any(m.fused_act for m in fused) and all(m.act is None for m in fused)
    assert all(m.fused_act is None for m in apart)
    # What a layer applies behind a residual that it adds was the block's.
    own = [m.fused_act if m.adds_residual_of is None else None for m in fused]
    assert [activation_name(m.act) for m in apart] == own


class Block(nn.Module):
    """A convolution, a normalization and an activation of its own, and what one does with them."""

    def __init__(self, forward: str = "plain", act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), act or nn.ReLU()
        self.way = forward

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if self.way == "read before":
            return y.mean() + self.act(y)
        if self.way == "read after":
            z = self.act(y)
            return z + y
        if self.way == "returned":
            return self.act(y), y
        if self.way == "shared activation":
            return self.act(self.act(y) - 0.5)
        if self.way == "shared norm":
            return self.act(self.bn(torch.cat([y, y])))
        if self.way == "training only" and not self.training:
            return y
        if self.way == "draws":
            torch.zeros(int(random.random() + torch.rand(()).item() + 1))
        if self.way == "untraceable" and float(x.detach().sum()) > 1e9:
            return y
        return self.act(y)


def fused(model: nn.Module) -> list[str | None]:
    """The activations that a model's norms apply themselves."""
    return [m.fused_act for m in model.modules() if isinstance(m, Norm)]


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_behind_a_norm_is_taken_over(name: str, inplace: bool) -> None:
    """A pair of modules with nothing between them, whatever its forward looks like; the result stays."""
    cls = ACTIVATIONS[name].module
    block = Block(act=cls(inplace=True) if inplace and name != "gelu" else cls()).double()
    randomize(block)
    converted = convert(copy.deepcopy(block), "bn")
    assert fused(converted) == [name] and isinstance(converted.act, nn.Identity)
    (row,) = audit(converted)
    assert row.reason == "replaced, with the activation of act"
    assert_same(outcome(converted, images()), outcome(block, images()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "way",
    ["read before", "read after", "returned", "shared activation", "shared norm", "training only", "untraceable"],
)
def test_an_activation_that_is_not_proven_to_belong_to_a_norm_alone_stays(way: str) -> None:
    """Where something else reads the norm's output, or the activation works elsewhere too, nothing is fused."""
    assert fused(convert(Block(way), "bn")) == [None]
    assert fused(convert(Block(), "bn")) == ["relu"]


def test_a_watched_pair_is_left_alone() -> None:
    """A forward hook on the norm would see another value; one on a block around it would not."""
    block = Block()
    block.bn.register_forward_hook(lambda module, args, output: None)
    assert fused(convert(block, "bn")) == [None]


def test_tracing_leaves_the_model_its_randomness_and_its_buffers_alone() -> None:
    """The forward that proves the pairs runs on a copy without values."""
    block = Block("draws")
    before, states = state(block), (torch.get_rng_state(), random.getstate())
    assert list(following_activations(block, [block.bn])) == [block.bn]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert_same(state(block), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 17), ("resnet50", 49)])
def test_timms_resnets_fuse_every_relu(name: str, count: int) -> None:
    """All but the norms of the projections, behind which there is none."""
    model = convert(timm.create_model(name), "en")
    assert sum(act == "relu" for act in fused(model)) == count
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]


@pytest.mark.parametrize("norm", ["en", "sn"])
@pytest.mark.parametrize("model_name", ["regnet", "resnetv2"])
def test_fused_and_unfused_mixtures_agree(norm: str, model_name: str) -> None:
    """The fused ReLU is the module's ReLU: output and gradients."""
    results = []
    for fuse in (True, False):
        torch.manual_seed(1)
        results.append(outcome(convert(trained(model_name), norm, fuse=fuse), images()))
    assert_same(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_drop_of_norm_act_layers_is_kept_and_comes_before_the_activation() -> None:
    """A drop layer stays, so the ReLU behind it is not fused."""

    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5 - 0.1

    old = timm.layers.BatchNormAct2d(6, drop_layer=Halve)
    randomize(old)
    new = convert(copy.deepcopy(old), "bn")
    assert isinstance(new, BatchNorm) and isinstance(new.drop, Halve) and isinstance(new.act, nn.ReLU)
    x = torch.randn(4, 6, 3, 3)
    torch.testing.assert_close(new(x), old(x))


@every_model
@pytest.mark.parametrize("norm", ["en", "sn"])
def test_mixtures_started_at_bn_reproduce_a_pretrained_network(norm: str, model_name: str) -> None:
    """initial="bn": evaluation close to the original with its affine and running values.

    Each layer leaves 1e-4 to IN and LN. A channel whose variance is far below its layer's feels it most in SN, where
    LN's variance leaks into it; depthwise networks have many of these.
    """
    original = trained(model_name)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        original.train()(images())
        want = original.eval()(images())
        got = convert(original, norm, initial="bn")(images())
    error = float((got - want).norm() / want.norm())
    assert error <= (5e-2 if model_name in ("mobilenetv3", "shufflenet") else 1e-3)


def test_trained_values_go_to_every_normalizer() -> None:
    """A (C,) weight fills every row of EN's (K, C); running values and the count are copied."""
    old = nn.BatchNorm2d(6)
    randomize(old)
    old.num_batches_tracked.fill_(7) if old.num_batches_tracked is not None else None
    for norm in ("en", "sn", "bn"):
        new = convert(copy.deepcopy(old), norm)
        values, source = new.state_dict(), old.state_dict()
        for key in ("weight", "bias"):
            assert torch.equal(values[key], source[key].expand_as(values[key]))
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(values[key], source[key])


@pytest.mark.parametrize("norm", NORMS)
def test_zero_initialised_weights_stay_zero(norm: str) -> None:
    """timm's zero_init_last: residual branches start at 0 behind any norm."""
    model = convert(timm.create_model("resnet18", zero_init_last=True), norm)
    zero = [name for name, m in model.named_modules() if isinstance(m, Norm) and bool((m.weight == 0).all())]
    assert len(zero) == 8 and all(name.endswith("bn2") for name in zero)


@pytest.mark.parametrize("norm", NORMS)
def test_dtype_device_mode_and_requires_grad_are_kept(norm: str) -> None:
    """Whatever state a layer was in, its replacement is in."""
    model = nn.Sequential(
        nn.BatchNorm2d(6, dtype=torch.float64).eval(),
        nn.BatchNorm2d(6, dtype=torch.bfloat16),
        nn.BatchNorm2d(6, device="meta"),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.01).requires_grad_(False),
    )
    convert(model, norm)
    assert [m.training for m in model] == [False, True, True, True]
    dtypes = [{p.dtype for p in m.parameters()} for m in model]
    assert dtypes == [{torch.float64}, {torch.bfloat16}, {torch.float32}, {torch.float32}]
    assert [{t.device.type for t in m.state_dict().values()} for m in model] == [{"cpu"}, {"cpu"}, {"meta"}, {"cpu"}]
    last = model[3]
    assert isinstance(last, Norm) and last.weight is not None and last.bias is not None
    assert last.eps == 1e-3 and not last.weight.requires_grad and not last.bias.requires_grad
    if isinstance(last, BatchScopeNorm):
        assert last.momentum == 0.01


def test_options_win_over_what_a_layer_had() -> None:
    """eps and momentum asked for replace the layer's own."""
    new = convert(nn.BatchNorm2d(6, eps=1e-3, momentum=0.01), "bn", eps=1e-4, momentum=None)
    assert isinstance(new, BatchNorm) and new.eps == 1e-4 and new.momentum is None


@pytest.mark.parametrize("norm", NORMS)
def test_layers_without_affine_map_or_running_statistics(norm: str) -> None:
    """affine=False stays without weight and bias, track_running_stats=False without buffers."""
    model = convert(nn.Sequential(nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False)), norm)
    first, second = model.children()
    assert isinstance(first, Norm) and isinstance(second, Norm)
    assert first.weight is None and first.bias is None and second.weight is not None
    assert not [name for name, _ in second.named_buffers() if "running" in name]
    assert model(torch.randn(4, 6, 3, 3)).isfinite().all()


def test_a_layer_with_two_parents_stays_one_layer() -> None:
    """Shared modules stay shared, so their parameters are not doubled."""
    shared = nn.BatchNorm2d(6)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared), "c": nn.BatchNorm2d(6)})
    convert(model, "sn")
    a, b = model.get_submodule("a.0"), model.get_submodule("b.0")
    assert a is b and isinstance(a, SwitchNorm) and model["c"] is not a


def test_synchronized_layers_stay_synchronized() -> None:
    """SyncBatchNorm becomes a norm with sync=True; norms without BN's scope just replace it."""
    new = convert(nn.SyncBatchNorm(6), "en")
    assert isinstance(new, ExemplarNorm) and new.sync
    assert isinstance(convert(nn.SyncBatchNorm(6), "ln"), LayerNorm)


def test_only_exact_types_are_replaced() -> None:
    """A subclass may do more than its base: it is left, and the audit says so."""

    class MyBatchNorm(nn.BatchNorm2d):
        pass

    model = nn.Sequential(MyBatchNorm(6), nn.BatchNorm2d(6))
    convert(model, "bn")
    assert type(model[0]) is MyBatchNorm and isinstance(model[1], BatchNorm)
    left = audit(model)[0]
    assert left.replacement is None and left.original.endswith("MyBatchNorm") and "not a known" in left.reason


@pytest.mark.parametrize("wrapper", ["ddp", "data parallel"])
def test_wrapped_models_are_refused(wrapper: str, tmp_path: Path) -> None:
    """DDP has registered the old parameters: the error says to convert first."""
    if wrapper == "data parallel":
        with pytest.raises(ValueError, match="DataParallel.*convert the bare model first"):
            convert(nn.DataParallel(nn.Sequential(nn.BatchNorm2d(6))), "bn")
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)))
        with pytest.raises(ValueError, match="the model is wrapped in DistributedDataParallel"):
            convert(wrapped, "bn")
        with pytest.raises(ValueError, match="submodule '0' is wrapped"):
            convert(nn.Sequential(wrapped), "bn")
        assert isinstance(wrapped.module[1], nn.BatchNorm2d)
    finally:
        dist.destroy_process_group()


def test_mistakes_name_what_is_allowed() -> None:
    """Unknown norm, kind and option, and nothing to replace."""
    model = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match=r"unknown norm 'bm'; allowed: bn, "):
        convert(model, "bm")
    with pytest.raises(ValueError, match=r"replace=\('batchnorm',\) is not possible; allowed: .*batch, group"):
        convert(model, "bn", replace=("batchnorm",))
    with pytest.raises(ValueError, match="allowed: a tuple of"):
        convert(model, "bn", replace="batch")
    with pytest.raises(ValueError, match="BatchNorm has no option 'num_groups'; allowed: .*momentum"):
        convert(model, "bn", num_groups=2)
    with pytest.raises(
        ValueError, match=r"nothing to replace: there is no layer of kind group; this model's kinds: batch \(1\)"
    ):
        convert(model, "bn", replace=("group",))
    with pytest.raises(ValueError, match="kinds: none"):
        convert(nn.Sequential(nn.ReLU()), "bn")
    assert isinstance(model[0], nn.BatchNorm2d)


def test_an_error_leaves_the_model_as_it_was() -> None:
    """No half-converted model: the second layer has no channels to normalize."""
    model = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm([6, 3]))
    with pytest.raises(ValueError, match="last 2 dimensions"):
        convert(model, "ln", replace=("layer",))
    assert type(model[0]) is nn.LayerNorm and type(model[1]) is nn.LayerNorm
    with pytest.raises(ValueError, match="momentum=7 is not possible"):
        convert(nn.Sequential(nn.BatchNorm2d(6)), "bn", momentum=7)


def test_audit_lists_what_was_replaced_built_and_left() -> None:
    """One row per normalization layer, with the reason; containers are no layers."""
    model = nn.Sequential(
        timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU),
        nn.GroupNorm(2, 6),
        GroupNorm(6),
        nn.InstanceNorm2d(6),
        timm.layers.FrozenBatchNormAct2d(6),
        timm.layers.ConvNormAct(6, 6),
    )
    before = audit(model)
    assert [row.replacement is None for row in before] == [True, True, False, True, True, True]
    convert(model, "en")
    rows = {row.name: row for row in audit(model)}
    assert list(rows) == ["0", "1", "2", "3", "4", "5.bn"]
    replaced = rows["0"]
    assert isinstance(replaced, AuditRow) and replaced.original.endswith("BatchNormAct2d")
    assert replaced.replacement is not None and replaced.replacement.startswith("ExemplarNorm(6, eps=1e-05")
    assert replaced.replacement.endswith(")") and replaced.reason == "replaced"
    assert rows["1"].replacement is None and "replace=('group',)" in rows["1"].reason
    assert rows["2"].reason == "built" and rows["3"].reason == "not a known normalization layer"
    assert "convert the model before it is frozen" in rows["4"].reason
    assert rows["5.bn"].reason == "replaced"


def test_layers_whose_names_match_a_pattern_stay_torchs() -> None:
    """With their activation, which nobody takes over; the audit says which pattern kept them."""
    model = timm.create_model("test_resnet", num_classes=3)
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    kept = {name for name in before if name.startswith("layer4.") or name.endswith(".bn1")}
    assert 1 < len(kept) < len(before)
    convert(model, "en", keep=["layer4.*", "*.bn1"])
    for name, module in before.items():
        assert (model.get_submodule(name) is module) == (name in kept), name
    assert type(model.layer1[0].act1) is nn.ReLU and type(model.layer1[0].act2) is nn.Identity
    reasons = {row.name: row.reason for row in audit(model) if row.replacement is None}
    assert reasons.keys() == kept
    assert reasons["layer1.0.bn1"] == "kept by keep=*.bn1"
    assert {reasons[name] for name in kept if name.startswith("layer4.") and not name.endswith(".bn1")} == {
        "kept by keep=layer4.*"
    }
    assert audit(copy.deepcopy(model)) == audit(model)
    assert {row.replacement is None for row in audit(convert(model, "en"))} == {False}


def test_a_shared_layer_is_kept_by_each_of_its_names() -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), shared)
    convert(model, "bn", keep=["2"])
    assert model[0] is shared and model[2] is shared and isinstance(model[1], BatchNorm)


def test_a_pattern_that_keeps_nothing_or_all_is_refused() -> None:
    """The message has the nearest names; the model is as it was."""
    model = timm.create_model("test_resnet", num_classes=3)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    near = r"keep=layer1\.0\.bn9 matches the name of no normalization layer; did you mean 'layer1\.0\.bn\d' or "
    with pytest.raises(ValueError, match=near):
        convert(model, "bn", keep=["*.bn1", "layer1.0.bn9"])
    with pytest.raises(ValueError, match="keep=conv1 matches the name of no normalization layer"):
        convert(nn.ModuleDict({"conv1": nn.Conv2d(3, 3, 1), "bn1": nn.BatchNorm2d(3)}), "bn", keep=["conv1"])
    with pytest.raises(ValueError, match=r"nothing to replace: keep=\*\.0,\* keeps every layer of kind batch"):
        convert(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))), "bn", keep=["*.0", "*"])
    with pytest.raises(ValueError, match=r"keep='head' is not possible; give a tuple of patterns, such as \('head',\)"):
        convert(model, "bn", keep="head")
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == count
    assert not any("kept" in row.reason for row in audit(model))


@every_model
def test_the_number_of_layers_and_activations_is_kept(model_name: str) -> None:
    """As many norms after as before, and as many activations, modules and fused ones together."""

    def activations(model: nn.Module) -> int:
        fused = sum(isinstance(m, Norm) and m.fused_act is not None for m in model.modules())
        return fused + sum(isinstance(m, nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish) for m in model.modules())

    original = MODELS[model_name]()
    before = sum(type(m) in KINDS["batch"] for m in original.modules())
    active = activations(original)
    convert(original, "en")
    assert sum(isinstance(m, ExemplarNorm) for m in original.modules()) == before > 0
    assert activations(original) == active
    assert sum(row.reason.startswith("replaced") for row in audit(original)) == before


def test_a_group_norm_network_converts_to_our_group_norm() -> None:
    """Kind "group", with the activations of GroupNormAct: the same function."""
    torch.manual_seed(0)
    original = tiny_resnetv2(norm_layer=partial(timm.layers.GroupNormAct, num_groups=4)).double()
    converted = convert(copy.deepcopy(original), "gn", replace=("group",), num_groups=4)
    assert_same(outcome(converted, images()), outcome(original, images()), rtol=1e-6, atol=1e-9)


def test_convnext_converts_with_both_layer_kinds() -> None:
    """LayerNorm over channels first and channels last: each gets its layout, and the model runs."""
    model = timm.create_model("convnext_atto", num_classes=5, conv_mlp=False)
    kinds = [type(m) for m in model.modules() if type(m) in (*KINDS["layer"], *KINDS["layer2d"])]
    convert(model, "sn", replace=("layer2d", "layer"))
    norms = [m for m in model.modules() if isinstance(m, Norm)]
    assert len(norms) == len(kinds)
    assert [m.channel_dim for m in norms] == [-1 if kind in KINDS["layer"] else 1 for kind in kinds]
    assert {m.channel_dim for m in norms} == {1, -1}
    assert model(images().float()).isfinite().all()


def test_rms_norms_convert_and_keep_having_no_bias() -> None:
    """Kind "rms": the layout of the layer, a weight and no bias."""
    model = nn.Sequential(nn.RMSNorm(6), timm.layers.RmsNorm(6))
    convert(model, "ln", replace=("rms",))
    for module in model:
        assert isinstance(module, LayerNorm) and module.channel_dim == -1 and module.bias is None
    two_dimensional = convert(timm.layers.RmsNorm2d(6), "ln", replace=("rms",))
    assert isinstance(two_dimensional, LayerNorm) and two_dimensional.channel_dim == 1


def test_every_normalization_class_of_timm_is_known_but_those_that_are_no_map_of_moments() -> None:
    """The rest: batch-free activations with statistics of their own, frozen or split batch norms, containers."""
    classes = {c for c in vars(timm.layers).values() if isinstance(c, type) and issubclass(c, nn.Module)}
    named = {c.__name__ for c in classes - {c for kind in KINDS.values() for c in kind} if "Norm" in c.__name__}
    evo = {f"EvoNorm2d{name}" for name in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")}
    response = {"FilterResponseNormAct2d", "FilterResponseNormTlu2d", "GlobalResponseNormMlp"}
    containers = {"ConvNormAct", "SeparableConvNormAct"}
    heads = {"ClNormMlpClassifierHead", "NormMlpClassifierHead"}
    assert named <= evo | response | containers | heads | {"FrozenBatchNormAct2d", "SplitBatchNorm2d"}


def test_a_layer_without_values_goes_where_the_model_is() -> None:
    """Its device and dtype can only be the model's."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)).to("meta", torch.float64)
    convert(model, "en", replace=("layer",))
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in model.parameters())


def test_a_class_can_be_given_and_a_bare_layer_is_returned() -> None:
    """`norm` may be a subclass of Norm; a model that is itself a layer comes back replaced."""
    assert isinstance(exnorm.convert(nn.BatchNorm1d(6), ExemplarNorm, pi=3), ExemplarNorm)
    assert norm_class(GroupNorm) is GroupNorm
    assert {"num_groups", "eps", "affine"} <= constructor_options(GroupNorm).keys()


def test_a_converted_model_can_be_copied_and_its_state_loads() -> None:
    """deepcopy after a step, and a strict state-dict round trip between two conversions."""
    model = convert(trained("regnet"), "en")
    model(images()).sum().backward()
    other = convert(trained("regnet", seed=3), "en")
    other.load_state_dict(model.state_dict(), strict=True)
    for module in (other, copy.deepcopy(model)):
        torch.testing.assert_close(module.eval()(images()), model.eval()(images()), rtol=0, atol=0)

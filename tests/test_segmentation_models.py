"""Segmentation networks: backbones of timm, three heads, their conversion, and weights of classification networks."""

import copy
import fnmatch
import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from exnorm import ops
from exnorm.config.compose import compose_train
from exnorm.config.errors import UserError
from exnorm.models import SegmentationNetwork, build_network, classifier, load_weights, normalized, segmentation_network
from exnorm.models.heads import HEADS, POOLED, PyramidHead, adaptive_average
from exnorm.norms import Norm, commit_running_stats, configure_scope
from exnorm.surgery import audit

torch.set_num_threads(1)

CLASSES = 5
NORMS = ("en", "sn", "gn", "bn")
PLAIN = {"architecture": None, "options": {}}  # another backbone than resnet_mini
MADE: dict[str, nn.Module] = {}
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compiled code has tests of its own."""
    with ops.using_backend("eager"):
        yield


@functools.cache
def composed(norm: str, model: str) -> Any:
    return compose_train([f"model={model}", f"norm={norm}"])


def configs(norm: str = "bn", model: str = "resnet_mini", **values: Any) -> Any:
    """A config, with values of its model group."""
    config = copy.deepcopy(composed(norm, model))
    for key, value in values.items():
        config.model[key] = value
    return config


def stock(
    model: str = "resnet_mini", *, stride: int = 8, aux: bool = True, classes: int = CLASSES, **values: Any
) -> SegmentationNetwork:
    """A network with torch's batch normalization."""
    torch.manual_seed(0)
    return segmentation_network(
        configs(model=model, **values).model, num_classes=classes, output_stride=stride, aux=aux
    )


def converted(norm: str, model: str = "resnet_mini", *, keep: Sequence[str] = (), **values: Any) -> Any:
    """A network with this norm. A conversion takes a second, so tests copy one that another test made."""
    key = repr((norm, model, keep, sorted(values.items())))
    if key not in MADE:
        config = configs(norm, model, keep=list(keep))
        MADE[key] = normalized(stock(model, **values), config.model, config.norm)
    return copy.deepcopy(MADE[key])


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """Random parameters and running statistics, as no two layers have them at the beginning."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for norm in (module for module in model.modules() if isinstance(module, Norm)):
        for name, value in norm.named_parameters(recurse=False):
            if name == "weight":
                nn.init.uniform_(value, 0.5, 1.5)
    for seed in range(3):
        model.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def needed(head: str, norm: str) -> list[str]:
    """What has to be kept: GN has one value per group where a narrow head has one position."""
    return [POOLED[head]] if norm == "gn" and head in POOLED else []


@pytest.mark.parametrize(
    ("model", "head", "norm"),
    [*(("resnet_mini", head, norm) for head in HEADS for norm in NORMS), ("resnet18", "psp", "en")],
)
def test_every_head_trains_with_every_norm(model: str, head: str, norm: str) -> None:
    network = converted(norm, model, head=head, keep=needed(head, norm))
    outputs = network.train()(images())
    assert [output.shape for output in outputs] == [(2, CLASSES, 8, 8)] * 2
    sum(output.square().mean() for output in outputs).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    logits = network.eval()(images(1))
    assert logits.shape == (1, CLASSES, 8, 8)


@every_head
@pytest.mark.parametrize("norm", NORMS)
def test_the_norms_of_backbone_and_heads_are_replaced_but_those_to_keep(head: str, norm: str) -> None:
    before = stock(head=head)
    names = {name for name, module in before.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.partition(".")[0] for name in names} == {"backbone", "head", "aux_head"}
    keep = [*needed(head, norm), "aux_head.*"]
    rows = {row.name: row for row in audit(converted(norm, head=head, keep=keep))}
    kept = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)}
    assert rows.keys() == names
    assert {name for name, row in rows.items() if row.replacement is None} == kept
    assert rows["aux_head.1"].reason == "kept by keep=aux_head.*"


@every_head
def test_conversion_to_bn_changes_nothing(head: str) -> None:
    network = stock(head=head)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = configs("bn")
    other = normalized(copy.deepcopy(network), config.model, config.norm)
    torch.testing.assert_close(other.eval()(images()), network.eval()(images()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.train()(images()), network.train()(images()), rtol=1e-3, atol=1e-3)
    assert other.backbone.layer1[0].bn2.adds_residual_of == "backbone.layer1.0"


def test_without_an_auxiliary_head_training_gives_a_tuple_of_one() -> None:
    network = stock(aux=False)
    assert network.aux_head is None
    (logits,) = network.train()(images())
    assert logits.shape == (2, CLASSES, 8, 8)


@pytest.mark.parametrize(("model", "width", "aux"), [("resnet_mini", 32, 16), ("resnet50", 512, 256)])
def test_heads_are_as_wide_as_their_backbone_asks_for(model: str, width: int, aux: int) -> None:
    for head in ("fcn", "psp"):
        network = stock(model, head=head)
        last = [module for module in network.head.modules() if isinstance(module, nn.Conv2d)][-1]
        assert (last.in_channels, last.out_channels) == (width, CLASSES)
        assert network.aux_head is not None and network.aux_head[4].in_channels == aux


@pytest.mark.parametrize("model", ["resnet_mini", "resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16])
def test_the_backbone_has_the_names_and_shapes_of_the_classification_network(model: str, stride: int) -> None:
    """`model.options` of resnet_mini has an output stride of its own, over which the argument wins."""
    with torch.device("meta"):
        network = stock(model, stride=stride)
        whole = classifier(configs(model=model).model, num_classes=3).state_dict()
        maps = network.eval().backbone(torch.zeros(1, 3, 64, 64))
    left = {name: value.shape for name, value in whole.items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in network.backbone.state_dict().items()} == left
    assert [tuple(features.shape[2:]) for features in maps] == [(64 // stride,) * 2] * 2


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (7, 9), (12, 8), (13, 90)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_averages_over_bins_are_those_of_torch(size: tuple[int, int], bins: int) -> None:
    """Also where the bins overlap, because the size does not divide, and where there are more bins than positions."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, torchs = adaptive_average(x, bins), F.adaptive_avg_pool2d(y, bins)
    torch.testing.assert_close(ours, torchs)
    weights = torch.randn_like(torchs)
    (ours * weights).sum().backward()
    (torchs * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def nodes(output: Tensor) -> set[str]:
    """The names of the operations that a result came from."""
    seen, todo = {}, [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return set(seen.values())


@every_head
def test_no_head_has_the_pooling_that_is_not_deterministic_on_a_gpu(head: str) -> None:
    names = nodes(stock(head=head).train()(images())[0])
    assert any(name.startswith("ConvolutionBackward") for name in names)
    assert not any("AdaptiveAvgPool" in name for name in names)


def test_the_pyramid_sees_the_whole_image_at_every_position() -> None:
    head = PyramidHead(16, CLASSES, 0.0).eval()
    x = torch.randn(1, 16, 12, 12, requires_grad=True)
    head(x)[0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad.abs().sum((0, 1)) > 0).all()


def dilations(network: SegmentationNetwork) -> list[int]:
    return [module.dilation[0] for module in network.head.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18])])
def test_deeplab_looks_equally_far_at_both_strides(stride: int, rates: list[int]) -> None:
    """The paper doubles the rates where the output stride is halved."""
    network = stock(head="deeplabv3", stride=stride)
    assert [rate for rate in dilations(network) if rate > 1] == rates
    size = 160
    logits = network.eval()(images(1, size))
    assert logits.shape == (1, CLASSES, size // stride, size // stride)


def test_deeplab_on_the_2048_channels_of_resnet50_is_torchvisions() -> None:
    ours, torchvisions = HEADS["deeplabv3"](2048, CLASSES, 8, 0.0).eval(), DeepLabHead(2048, CLASSES).eval()
    torchvisions.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2048, 4, 5)
    torch.testing.assert_close(ours(x), torchvisions(x))


def test_convolutions_of_heads_start_as_he_et_al_say() -> None:
    network = stock("resnet18", head="psp")
    for head in (network.head, network.aux_head):
        assert head is not None
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head": "pspnet"}, "model.head=pspnet is unknown; allowed: fcn, psp, deeplabv3"),
        ({"stride": 4}, "an output stride of 4 is not possible; allowed: 8 or 16"),
        (
            {"name": "vgg11_bn", **PLAIN},
            "its last features cannot have stride 8: its stages have the strides 1, 2, 4, 8, 16, 32, "
            "and timm cannot dilate it; use a ResNet",
        ),
        ({"name": "test_vit", **PLAIN}, "cannot have stride 8: .* strides 16, and"),
        ({"name": "shufflenet_v2_x0_5"}, "ShuffleNet v2 has no features at stride 8; use a ResNet"),
        ({"name": "resnt18", "architecture": None}, r"unknown model; did you mean 'resnet18'\?"),
        ({"options": {"colour": 3}}, "timm cannot make a feature extractor of it .*unexpected keyword.*colour"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_says_what_can(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        stock(**values)
    assert "\n" not in str(caught.value)


def test_mistakes_of_any_network_begin_with_the_names_of_model_and_norm() -> None:
    config = configs("en", head="pspnet")
    build = functools.partial(segmentation_network, output_stride=8, aux=True)
    with pytest.raises(UserError, match="^model=resnet_mini norm=en: model.head=pspnet is unknown"):
        build_network(partial(build, num_classes=CLASSES), config.model, config.norm)
    config = configs("in", head="psp")
    with pytest.raises(UserError, match=r"^model=resnet_mini norm=in: head\.branches\.bin1\.1 normalizes"):
        build_network(partial(build, num_classes=CLASSES), config.model, config.norm)


def test_a_classification_network_has_no_head_to_choose() -> None:
    with pytest.raises(UserError, match="model.head=psp is for segmentation; leave model.head at"):
        classifier(configs(model="resnet18", head="psp").model, num_classes=3)


def test_a_backbone_with_the_stride_by_itself_needs_no_dilation() -> None:
    """A ViT has no dilated convolutions, and one map of tokens at stride 16."""
    network = stock(stride=16, name="test_vit", architecture=None, options={"img_size": 64})
    assert network.eval()(images(1)).shape == (1, CLASSES, 4, 4)


@pytest.mark.parametrize("head", ["psp", "deeplabv3"])
@pytest.mark.parametrize("norm", ["in", "gn"])
def test_a_norm_of_one_value_is_refused_with_the_pattern_that_keeps_bn(head: str, norm: str) -> None:
    """What the message says to type is understood on a command line, and trains."""
    with pytest.raises(UserError, match=r"norm=(in|gn): head\..* pooled to 1 position.*type 'model\.keep=") as caught:
        converted(norm, head=head)
    advice = str(caught.value).partition("type '")[2].partition("'")[0]
    config = compose_train(["model=resnet_mini", f"norm={norm}", advice])
    network = normalized(stock(head=head), config.model, config.norm)
    (kept,) = [row for row in audit(network) if row.replacement is None]
    assert fnmatch.fnmatchcase(kept.name, POOLED[head])
    network.train()(images())


def test_a_wide_head_has_room_for_groups_at_one_position() -> None:
    """GN is refused only where it cannot be: 512 / 4 = 128 channels make 32 groups of 4."""
    converted("gn", "resnet18", head="psp")
    with pytest.raises(UserError, match="pooled to 1 position"):
        converted("in", "resnet18", head="psp")


@pytest.mark.parametrize(
    ("norm", "head", "prefix"), [("en", "fcn", ""), ("sn", "psp", ""), ("bn", "fcn", ""), ("en", "fcn", "module.")]
)
def test_a_classification_run_gives_its_backbone(norm: str, head: str, prefix: str) -> None:
    """With its norms, ratios and running statistics: features are equal where the dilation is the same."""
    config = configs(norm)
    source = trained(build_network(partial(classifier, num_classes=3), config.model, config.norm))
    network = converted(norm, head=head, stride=16)
    before = copy.deepcopy(network.state_dict())
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    notes = load_weights(network, state, source="somewhere")
    assert notes == [
        *(["loaded the weights whose names begin with module."] if prefix else []),
        "left out what this network does not have: fc.bias, fc.weight",
        "aux_head and head, for which the source has no weights, start anew",
    ]
    after = network.state_dict()
    for name, value in source.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(after[f"backbone.{name}"], value), name
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("backbone."))
    with torch.no_grad():
        want = source.forward_features(images())
        torch.testing.assert_close(network.eval().backbone(images())[-1], want, rtol=0, atol=0)
    assert want.abs().max() > 0


def test_plain_weights_of_timm_go_to_the_backbone_of_any_norm() -> None:
    source = timm.create_model("test_resnet", num_classes=7)
    network = converted("en", name="test_resnet", **PLAIN)
    notes = load_weights(network, source.state_dict(), source="somewhere")
    for name, module in source.named_modules():
        if isinstance(module, nn.Conv2d):
            assert torch.equal(network.get_parameter(f"backbone.{name}.weight"), module.weight)
        if isinstance(module, nn.BatchNorm2d):
            weight = network.get_parameter(f"backbone.{name}.weight")
            assert torch.equal(weight, module.weight.expand_as(weight))
    assert any("of the norms start anew" in note for note in notes)


def test_names_that_timm_flattens_are_found() -> None:
    """`stages.0.` of a classification network is `stages_0.` in its feature extractor."""
    source = timm.create_model("test_convnext", num_classes=7)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    network = stock(name="test_convnext", **PLAIN)
    notes = load_weights(network, source.state_dict(), source="somewhere")
    assert "left out what this network does not have: head.fc.bias" in notes[0]
    after = network.state_dict()
    inside = [name for name in source.state_dict() if not name.startswith("head.")]
    assert any("stages" in name for name in inside)
    for name in inside:
        assert torch.equal(after[f"backbone.{name.replace('.', '_', 1)}"], source.state_dict()[name]), name


@pytest.mark.parametrize("head", ["fcn", "deeplabv3"])
def test_a_segmentation_run_gives_all_but_the_last_layers_of_other_classes(head: str) -> None:
    source = trained(converted("en", head=head))
    same, other = converted("en", head=head), converted("en", head=head, classes=7)
    assert load_weights(same, source.state_dict(), source="somewhere") == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.state_dict().items())
    notes = load_weights(other, source.state_dict(), source="somewhere")
    anew = {name for name, value in other.state_dict().items() if value.shape != source.state_dict()[name].shape}
    assert len(anew) == len(notes) == 4 and all("starts anew" in note for note in notes)
    for name, value in other.state_dict().items():
        assert name in anew or torch.equal(value, source.state_dict()[name]), name


def test_the_auxiliary_head_may_be_on_one_side_only() -> None:
    source, target = trained(converted("sn", aux=False)), converted("sn")
    notes = load_weights(target, source.state_dict(), source="somewhere")
    assert notes == ["aux_head, for which the source has no weights, start anew"]
    notes = load_weights(converted("sn", aux=False), target.state_dict(), source="somewhere")
    assert len(notes) == 1 and notes[0].startswith("left out what this network does not have: aux_head.0.weight, ")


@pytest.mark.parametrize(
    "options",
    [{"layers": [1, 1, 2, 1]}, {"channels": [16, 32, 64, 96]}, {"layers": [1, 1, 1, 2]}],
    ids=["a block more", "narrower", "a block more at the end"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_weights_of_another_backbone_are_refused(options: dict[str, Any], swapped: bool) -> None:
    usual = dict(configs().model.options)
    ours, theirs = ({**usual, **options}, usual) if swapped else (usual, {**usual, **options})
    source = classifier(configs(options=theirs).model, num_classes=3)
    with pytest.raises(UserError, match=r"somewhere holds the weights of another architecture: backbone\.layer"):
        load_weights(stock(options=ours), source.state_dict(), source="somewhere")


def test_weights_of_another_head_are_refused() -> None:
    with pytest.raises(UserError, match=r"another architecture: head\."):
        load_weights(converted("sn", head="psp"), converted("sn", head="fcn").state_dict(), source="somewhere")


def test_a_kept_batch_normalization_normalizes_over_a_whole_pass_and_counts_each() -> None:
    """`docs/limitations.md` says so: replicas and the steps of the engine are not for layers of torch."""
    network = converted("bn", head="psp", keep=["head.branches.bin1.*"])
    configure_scope(network, replicas=2)
    kept, ours = network.head.branches.bin1[1], network.head.branches.bin2[1]
    inputs: dict[nn.Module, Tensor] = {}
    for layer in (kept, ours):
        layer.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].detach()))
    for _ in range(2):
        network.train()(images(4))
    commit_running_stats(network)
    assert (int(kept.num_batches_tracked), int(ours.num_batches_tracked)) == (2, 1)
    with torch.no_grad():
        x = inputs[kept]
        torch.testing.assert_close(kept(x), F.batch_norm(x, None, None, kept.weight, kept.bias, training=True))
        x = inputs[ours]
        halves = [F.batch_norm(half, None, None, ours.weight, ours.bias, training=True).relu() for half in x.split(2)]
        torch.testing.assert_close(ours(x), torch.cat(halves), rtol=1e-4, atol=1e-4)

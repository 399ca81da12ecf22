"""SN's variants: channel groups with ratios of their own, hard ratios, and ratios taken from another run."""

from pathlib import Path

import pytest
import torch
from engine_cases import last_state, make_image_folder, tiny, train_here

from exnorm.config.errors import UserError
from exnorm.models import load_ratios
from exnorm.norms import BatchNorm, InstanceNorm, LayerNorm, Norm, SparseSwitchNorm, SwitchNorm
from exnorm.norms.reference import statistics
from exnorm.testing.layers import draw


def random_sn(channels: int = 6, kind: type[SwitchNorm] = SwitchNorm, **options: object) -> SwitchNorm:
    """An SN in float64 with random parameters."""
    norm = kind(channels, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return norm


def test_each_group_of_channels_is_mixed_with_its_own_ratios() -> None:
    """Written out: the statistics are those of the whole layer, the weights of the channel's group."""
    norm, x = random_sn(groups=2), draw(4, 6, 3, 5)
    assert norm.mean_weight.shape == norm.var_weight.shape == (2, 3)
    pairs = [[value.expand(4, 6, 1, 1) for value in statistics(x, scope)] for scope in norm.normalizers]
    parts = []
    for group, channels in enumerate((slice(0, 3), slice(3, 6))):
        shares, var_shares = norm.mean_weight[group].softmax(0), norm.var_weight[group].softmax(0)
        mean = sum(share * pair[0][:, channels] for share, pair in zip(shares, pairs, strict=True))
        var = sum(share * pair[1][:, channels] for share, pair in zip(var_shares, pairs, strict=True))
        affine = [p[channels].reshape(1, 3, 1, 1) for p in (norm.weight, norm.bias) if p is not None]
        parts.append(affine[0] * (x[:, channels] - mean) / torch.sqrt(var + norm.eps) + affine[1])
    torch.testing.assert_close(norm(x), torch.cat(parts, 1))


def test_equal_groups_are_one_group() -> None:
    one, two, x = random_sn(), random_sn(groups=2), draw(4, 6, 3, 5)
    with torch.no_grad():
        for name in ("mean_weight", "var_weight"):
            getattr(two, name).copy_(getattr(one, name).expand(2, 3))
        for name in ("weight", "bias"):
            getattr(two, name).copy_(getattr(one, name))
    torch.testing.assert_close(two(x), one(x))


def test_groups_are_lowered_to_a_divisor_of_the_channels() -> None:
    assert SwitchNorm(9, groups=2).groups == 1
    assert SwitchNorm(9, groups=4).mean_weight.shape == (3, 3)


@pytest.mark.parametrize(("first", "plain"), [(0, InstanceNorm), (1, LayerNorm), (2, BatchNorm)])
@pytest.mark.parametrize("kind", [SwitchNorm, SparseSwitchNorm])
def test_hard_ratios_are_the_normalizer_with_the_largest_one(
    kind: type[SwitchNorm], first: int, plain: type[Norm]
) -> None:
    norm, x = random_sn(kind=kind, hard=True), draw(4, 6, 3, 5)
    with torch.no_grad():
        norm.mean_weight[first] = norm.var_weight[first] = 10.0
        other = plain(6, dtype=torch.float64)
        other.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    torch.testing.assert_close(norm(x), other(x))


def test_hard_ratios_are_not_learned_and_do_not_decay() -> None:
    norm = random_sn(hard=True)
    norm(draw(4, 6, 3, 5)).square().sum().backward()
    assert norm.mean_weight.grad is None and not norm.mean_weight.requires_grad
    assert norm.weight is not None and norm.weight.grad is not None


def test_ratios_alone_are_taken_from_another_model() -> None:
    source, model = torch.nn.Sequential(random_sn()), torch.nn.Sequential(SwitchNorm(6, dtype=torch.float64))
    load_ratios(model, source.state_dict(), source="there")
    assert torch.equal(model[0].mean_weight, source[0].mean_weight)
    assert torch.equal(model[0].weight, torch.ones(6, dtype=torch.float64))
    with pytest.raises(UserError, match="init_ratios_from=there: there has no 0.mean_weight like this model's"):
        load_ratios(model, torch.nn.Sequential(SwitchNorm(6, normalizers=["in", "ln"])).state_dict(), source="there")
    with pytest.raises(UserError, match="no layer of this model mixes normalizers"):
        load_ratios(torch.nn.Sequential(BatchNorm(6)), source.state_dict(), source="there")


@pytest.mark.slow
def test_a_run_with_hard_ratios_begins_with_a_snapshot_of_another(tmp_path: Path) -> None:
    """The snapshot of half of the epochs stays; finetuning takes all of it, from scratch its ratios alone."""
    data = make_image_folder(tmp_path / "data")
    soft = train_here(tiny(data, "norm=sn", "trainer.epochs=4", "trainer.snapshots=[0.5]"), tmp_path)
    snapshot = soft / "checkpoints" / "snapshot-0.5.pt"
    state = torch.load(snapshot, weights_only=True)
    assert state["epoch"] == 2
    hard = ["norm=sn", "norm.hard=true", "trainer.epochs=1", "optim.lr=0"]
    finetuned = last_state(train_here(tiny(data, *hard, f"model.init_from={snapshot}"), tmp_path))["model"]
    scratch = last_state(train_here(tiny(data, *hard, f"model.init_ratios_from={snapshot}"), tmp_path))["model"]
    for name, value in state["model"].items():
        if name.endswith(("mean_weight", "var_weight")):
            assert torch.equal(finetuned[name], value) and torch.equal(scratch[name], value)
        elif name == "conv1.weight":
            assert torch.equal(finetuned[name], value) and not torch.equal(scratch[name], value)

"""BN's scope: virtual replicas, several passes, and real processes give the same mathematics."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_cases import BATCH_NORMS, build
from process_cases import in_processes
from torch import Tensor, nn

from exnorm.norms import BatchNorm, BatchScopeNorm, Norm, commit_running_stats, configure_scope
from exnorm.norms.statistics import Moments, replica_statistics
from exnorm.testing.layers import assert_same, draw, gradients, state

torch.set_num_threads(1)

every_batch_norm = pytest.mark.parametrize("name", BATCH_NORMS)
SAMPLES = 8
Results = dict[str, Tensor]


def inputs(rank: int = 0, sizes: tuple[int, ...] = (SAMPLES,)) -> tuple[Tensor, Tensor]:
    """This process's consecutive part of one batch and of the gradient of its output."""
    x, grad = draw(SAMPLES, 6, 3, 3), draw(SAMPLES, 6, 3, 3, seed=5)
    return x.split(sizes)[rank].clone(), grad.split(sizes)[rank].clone()


def step(norm: Norm, x: Tensor, grad: Tensor, passes: int = 1) -> Results:
    """One optimizer step's worth of passes: output, gradients and, after one commit, buffers."""
    norm.train()
    outputs: list[Tensor] = []
    total: Results = {}
    for x_part, grad_part in zip(x.chunk(passes), grad.chunk(passes), strict=True):
        x_part = x_part.clone().requires_grad_()
        y = norm(x_part)
        outputs.append(y.detach())
        found = gradients(y, x_part, norm, grad_part)
        found["x"] = torch.cat((total["x"], found["x"])) if total else found["x"]
        total = {key: value if key == "x" or not total else total[key] + value for key, value in found.items()}
    commit_running_stats(norm)
    return {"y": torch.cat(outputs), **total, **{f"buffer {k}": v for k, v in state(norm).items() if "running" in k}}


@pytest.mark.parametrize("name", ["sn", "en"])
@pytest.mark.parametrize("training", [True, False])
def test_a_mix_without_bn_takes_any_number_of_samples(name: str, training: bool) -> None:
    """Eight replicas of one sample have no scope that could be split wrongly."""
    norm = build(name, normalizers=["in", "ln"]).train(training)
    configure_scope(norm, replicas=8)
    alone = norm(inputs()[0][:1])
    assert_same({"y": alone}, {"y": norm(inputs()[0])[:1]}, rtol=1e-9, atol=1e-10)


@every_batch_norm
def test_replicas_do_not_see_each_other(name: str) -> None:
    """Another second replica leaves the first one's output alone; without replicas it does not."""
    x, _ = inputs()
    other = x.clone()
    other[4:] *= 3
    for replicas, same in ((2, True), (1, False)):
        norm = build(name)
        configure_scope(norm, replicas=replicas)
        assert torch.allclose(norm(x)[:4], norm(other)[:4]) is same


@every_batch_norm
def test_running_statistics_move_once_by_the_mean_over_replicas_and_passes(name: str) -> None:
    """Closed form over 2 passes of 2 replicas; before the commit nothing has moved."""
    norm = build(name, momentum=0.25)
    assert isinstance(norm, BatchScopeNorm) and norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    before = state(norm)
    configure_scope(norm, replicas=2)
    x, _ = inputs()
    for part in x.chunk(2):
        norm(part)
    assert_same(state(norm), before, rtol=0, atol=0)
    commit_running_stats(norm)
    replica_values = [part.transpose(0, 1).flatten(1) for part in x.chunk(4)]
    correction = 1 if isinstance(norm, BatchNorm) else 0
    mean_C = torch.stack([value.mean(1) for value in replica_values]).mean(0)
    var_C = torch.stack([value.var(1, correction=correction) for value in replica_values]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.75 * before["running_mean"] + 0.25 * mean_C)
    torch.testing.assert_close(norm.running_var, 0.75 * before["running_var"] + 0.25 * var_C)
    assert int(norm.num_batches_tracked) == int(before["num_batches_tracked"]) + 1


@every_batch_norm
def test_a_layer_from_the_meta_device_starts_without_pending_statistics(name: str) -> None:
    """`to_empty` leaves arbitrary values in what no state dict holds; so does `from_pretrained` of transformers."""
    norm, loaded = build(name), build(name)
    loaded.to("meta").to_empty(device="cpu")
    loaded.load_state_dict(norm.state_dict())
    for pending in ("pending_mean", "pending_var", "pending_count"):
        getattr(loaded, pending).fill_(7)  # what the memory happened to hold
    x, _ = inputs()
    for layer in (norm, loaded):
        configure_scope(layer)
        layer(x.chunk(2)[0])
        configure_scope(layer)  # a second call forgets nothing
        layer(x.chunk(2)[1])
        commit_running_stats(layer)
    assert_same(state(loaded), state(norm), rtol=0, atol=0)


@every_batch_norm
def test_sync_widens_the_scope_to_all_replicas(name: str) -> None:
    """sync=True in one process: the whole batch, whatever replicas are asked for."""
    synced, whole = build(name, sync=True), build(name)
    configure_scope(synced, replicas=4)
    configure_scope(whole, replicas=1)
    assert_same(step(synced, *inputs()), step(whole, *inputs()), rtol=1e-12, atol=1e-12)


@every_batch_norm
def test_a_batch_that_does_not_split_is_refused(name: str) -> None:
    """The error names both numbers."""
    norm = build(name)
    configure_scope(norm, replicas=3)
    with pytest.raises(ValueError, match="8 samples do not split into 3 replicas"):
        norm(inputs()[0])


@every_batch_norm
def test_one_value_per_replica_is_refused_in_training(name: str) -> None:
    """Four replicas of one sample with one position each: nothing to normalize by."""
    norm = build(name)
    configure_scope(norm, replicas=4)
    with pytest.raises(ValueError, match="1 value per channel in BN's scope"):
        norm(draw(4, 6, 1, 1))
    assert norm.eval()(draw(4, 6, 1, 1)).isfinite().all()


def test_replica_statistics_are_the_total_variance() -> None:
    """Moments of positions combine to the moments of the union."""
    x = draw(6, 3, 4)
    moments = Moments(x.mean(2), x.var(2, correction=0), 4, replicas=3)
    mean_RC, var_RC, count = replica_statistics(moments)
    assert count == 8
    union = x.reshape(3, 2, 3, 4).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean_RC, union.mean(2))
    torch.testing.assert_close(var_RC, union.var(2, correction=0))


def test_commit_covers_every_layer_and_leaves_unused_ones() -> None:
    """One commit for a model of several layers; a layer that did not run keeps its statistics."""
    model = nn.ModuleList([build("bn"), build("en"), build("sn"), build("ln"), build("bn", track_running_stats=False)])
    twins = copy.deepcopy(model)
    configure_scope(model)
    x, _ = inputs()
    for index in (0, 1, 3, 4):
        for layers in (model, twins):
            layers[index](x)
    commit_running_stats(model)
    for key, value in twins.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value)


# Each case: how many replicas this process holds (None: no call of configure_scope), whether a replica spans both,
# sync, and the same in one process; with the samples of each process where they are not equally many.
CASES: dict[str, dict[str, Any]] = {
    "replica spans both": {"replicas": 1, "spans": True, "sync": False, "single": 1},
    "sync": {"replicas": 2, "spans": False, "sync": True, "single": 1},
    "sync without an engine": {"replicas": None, "spans": False, "sync": True, "single": 1},
    "sync, unequal": {"replicas": None, "spans": False, "sync": True, "single": 1, "sizes": (3, 5)},
    "sync, one without samples": {"replicas": 1, "spans": False, "sync": True, "single": 1, "sizes": (0, 8)},
    "one replica each": {"replicas": 1, "spans": False, "sync": False, "single": 2},
    "two replicas each": {"replicas": 2, "spans": False, "sync": False, "single": 4},
}
WORLD = 2


def in_process(rank: int, port: int, folder: str) -> None:
    """One of two processes: every case of every norm, written to a file."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    results = {}
    for name in BATCH_NORMS:
        for case, setting in CASES.items():
            norm = build(name, act="relu", sync=setting["sync"])
            group = dist.group.WORLD if setting["spans"] else None
            if setting["replicas"] is not None:
                configure_scope(norm, replicas=setting["replicas"], group=group)
            results[name, case] = step(norm, *inputs(rank, setting.get("sizes", (4, 4))))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Results]]:
    """What two real processes computed, started once for all tests."""
    return in_processes(in_process, WORLD, tmp_path_factory.mktemp("gloo"))


@every_batch_norm
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(name: str, case: str, by_rank: list[dict[tuple[str, str], Results]]) -> None:
    """Outputs, input gradients and running statistics; parameters' gradients as their sum over the processes.

    Both sides take the gradient of the same sum over all samples; with a mean over each process's samples, parameters
    averaged over processes differ by the same factor on both sides.
    """
    setting = CASES[case]
    norm = build(name, act="relu")
    configure_scope(norm, replicas=setting["single"])
    want = step(norm, *inputs())
    parts = [results[name, case] for results in by_rank]
    got = {}
    for key, value in parts[0].items():
        if key in ("y", "x"):
            got[key] = torch.cat([part[key] for part in parts])
        elif key.startswith("buffer"):
            assert torch.equal(value, parts[1][key]), "buffers agree on every process"
            got[key] = value
        else:
            got[key] = value + parts[1][key]
    assert_same(got, want, rtol=1e-9, atol=1e-10)

"""Residual additions: one that a layer does itself changes nothing, and what is not proven stays as it is."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms import BatchNorm, ExemplarNorm, Norm
from exnorm.surgery import audit, convert, residuals
from exnorm.testing.layers import assert_same, randomize, state

torch.set_num_threads(1)


class Block(nn.Module):
    """A convolution, a normalization and an activation, and a forward that is given."""

    def __init__(self, run: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.project = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.identity, self.run = nn.Identity(), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Optional(Block):
    """An argument that its callers may leave out."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return self.act(self.bn(self.conv(x)) + (x if shortcut is None else shortcut))


class Frozen(Block):
    """A mode of torch that a trace does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shortcut = self.project(x)
        return self.act(self.bn(self.conv(x)) + shortcut)


class Keeping(Block):
    """A value that others may read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.last = y.mean()
        return self.act(y + x)


class Random(Block):
    """A number that decides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x) if random.random() < 2 else x


class Scaled(Block):
    """A tensor of its own."""

    def __init__(self, run: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__(run)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x) * self.gamma


class Inner(Block):
    """A residual block that ends with a norm, which a block around it could use for its own addition."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)) + x)
        return self.project[1](self.project[0](y))


class Outer(nn.Module):
    """A block around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = Inner(in_place), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x) + x)


class Lender(nn.Module):
    """A block around one whose activation it uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(in_place), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block.act(self.head(self.block(x)) - 0.3)


class Fusible(Block):
    """A class with a method that may change its forward."""

    def switch_to_deploy(self) -> None:
        """As re-parameterizable blocks have one."""


def in_place(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    y += x
    return block.act(y)


def into_the_shortcut(block: Block, x: Tensor) -> Tensor:
    shortcut = block.project(x)
    z = shortcut * 2
    shortcut += block.bn(block.conv(x))
    return block.act(shortcut) + z


def read_twice(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    return block.act(y + x) + y.mean()


def training_only(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    return block.act(y + x) if block.training else block.act(y)


def on_values(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    return block.act(y + x) if x.sum() > 0 else y


def on_a_type(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    return y - x if type(x) is Tensor else block.act(y + x)


def broadcast(block: Block, x: Tensor) -> Tensor:
    return block.act(block.bn(block.conv(x)) + x.mean((2, 3), keepdim=True))


def with_a_number(block: Block, x: Tensor) -> Tensor:
    return block.act(block.bn(block.conv(x)) + 1.5)


def scaled(block: Block, x: Tensor) -> Tensor:
    return block.act(torch.add(block.bn(block.conv(x)), x, alpha=2))


def with_itself(block: Block, x: Tensor) -> Tensor:
    y = block.bn(block.conv(x))
    return block.act(y + y)


def input_changed_meanwhile(block: Block, x: Tensor) -> Tensor:
    z = block.conv(x)
    y = block.bn(z)
    z.mul_(3)
    return block.act(y + x)


def model_of(block: nn.Module, *, twice: bool = False) -> nn.Module:
    """A model around a block, with random values."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block, *([block] if twice else []), nn.Conv2d(4, 2, 1)).double()
    for number, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            randomize(module, number)
    return model


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Output, gradients and the state afterwards, in training and in evaluation."""
    found = {}
    for training in (True, False):
        model.train(training).zero_grad()
        x = torch.randn(3, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert x.grad is not None
        after = {f"state {name}": value for name, value in state(model).items()}
        found |= {f"{training} {name}": t for name, t in ({"y": y.detach(), "x": x.grad} | grads | after).items()}
    return found


def adding(model: nn.Module) -> dict[str, str | None]:
    """The layers that add a residual, and the activations that they apply behind it."""
    return {n: m.fused_act for n, m in model.named_modules() if isinstance(m, Norm) and m.adds_residual_of is not None}


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of this file are seen as timm's are."""
    monkeypatch.setattr(residuals, "TRUSTED", (*residuals.TRUSTED, __name__))
    residuals._is_plain_class.cache_clear()


@pytest.mark.parametrize(
    ("run", "layers"),
    [
        (in_place, {"1.bn": "relu"}),
        (lambda block, x: block.act(x + block.identity(block.bn(block.conv(x)))), {"1.bn": "relu"}),
        (lambda block, x: block.act(block.project(x).add_(block.bn(block.conv(x)))), {"1.project.1": "relu"}),
        (lambda block, x: block.bn(block.conv(x)) + x, {"1.bn": None}),
        (lambda block, x: block.act(block.bn(block.conv(x)) + x) + block.act(block.conv(x)), {"1.bn": "relu"}),
        (lambda block, x: block.project(block.bn(block.conv(x)) + x) + x, {"1.bn": None, "1.project.1": None}),
        (lambda block, x: torch.sigmoid(z := block.bn(block.conv(x)) + x) * z, {"1.bn": None}),
    ],
)
def test_an_addition_behind_a_norm_is_taken_over(
    run: Callable[[Block, Tensor], Tensor], layers: dict[str, str | None]
) -> None:
    """Whichever way it is written, alone or with its ReLU: output, gradients and running values stay."""
    model = model_of(Block(run))
    converted = convert(copy.deepcopy(model), "bn")
    assert adding(converted) == layers
    assert_same(outcome(converted), outcome(model), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "block",
    [
        *map(Block, (read_twice, training_only, on_values, on_a_type, broadcast, with_a_number, scaled, with_itself)),
        *map(Block, (into_the_shortcut, input_changed_meanwhile)),
        *[cls(in_place) for cls in (Optional, Fusible, Frozen, Keeping, Random, Scaled)],
    ],
    ids=lambda block: block.run.__name__ if type(block) is Block else type(block).__name__,
)
def test_an_addition_that_is_not_proven_stays(block: Block) -> None:
    """The model computes what it did, by the block's own forward."""
    model = model_of(block)
    converted = convert(copy.deepcopy(model), "bn")
    assert adding(converted) == {} and type(converted[1]) is type(block)  # type: ignore[index]
    if block.run not in (on_values, input_changed_meanwhile):  # which torch cannot differentiate
        assert_same(outcome(converted), outcome(model), rtol=1e-8, atol=1e-10)


def test_a_block_that_runs_twice_or_is_watched_is_left_alone() -> None:
    """What one forward shows need not hold for the other; a hook goes on to see what it saw."""
    assert adding(convert(model_of(Block(in_place), twice=True), "bn")) == {}
    projecting = Block(lambda block, x: block.act(block.project(block.conv(x)) + x))
    for watched, before, layers in (
        ("bn", Block(in_place), {}),
        ("project", projecting, {}),
        ("act", Block(in_place), {"1.bn": None}),
        ("", Block(in_place), {"1.bn": "relu"}),
    ):
        seen: list[Tensor] = []
        before.get_submodule(watched).register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        model = convert(model_of(before), "bn")
        assert adding(model) == layers
        outcome(model)
        assert len(seen) == 2


def test_a_block_in_a_rewritten_block_and_a_lent_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer block does not use the inner one's old forward; a ReLU that others call as well stays there."""
    for block, layers in ((Outer(), {"1.inner.bn": "relu"}), (Lender(), {"1.block.bn": "relu"})):
        model = model_of(block)
        converted = convert(copy.deepcopy(model), "bn")
        assert adding(converted) == layers
        assert_same(outcome(converted), outcome(model), rtol=1e-8, atol=1e-10)


def test_blocks_of_other_packages_and_other_forwards_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not timm's or torchvision's, or was changed by somebody, may do more than its operations show."""
    block = Block(in_place)
    block.forward = lambda x: block.act(0.5 * block.bn(block.conv(x)) + x)  # type: ignore[method-assign]
    assert adding(convert(model_of(block), "bn")) == {}
    monkeypatch.setattr(residuals, "TRUSTED", ("timm.", "torchvision."))
    residuals._is_plain_class.cache_clear()
    assert adding(convert(model_of(Block(in_place)), "bn")) == {}


def test_it_is_not_done_unasked() -> None:
    """fuse=False leaves the blocks alone."""
    assert adding(convert(model_of(Block(in_place)), "bn", fuse=False)) == {}


@pytest.mark.parametrize(
    ("name", "total", "relu"),
    [("resnet18", 8, 8), ("resnet50", 16, 16), ("regnetx_002", 13, 13), ("mobilenetv2_050", 10, 0)],
)
def test_timms_residual_blocks_are_rewritten(name: str, total: int, relu: int) -> None:
    """Each last norm of a block: direct children, and those in a container of convolution and norm."""
    acts = list(adding(convert(timm.create_model(name), "en")).values())
    assert (len(acts), acts.count("relu")) == (total, relu)


def test_a_rewritten_block_stays_what_it_was() -> None:
    """Its class, children, state and attributes; it can be copied and pickled, and the audit says what was done."""
    model = timm.create_model("test_resnet", num_classes=5).double()
    block, names = model.get_submodule("layer1.0"), list(dict(model.named_modules()))
    cls, attributes = type(block), vars(block).keys()
    convert(model, ExemplarNorm)
    assert model.get_submodule("layer1.0") is block and vars(block).keys() == attributes
    assert isinstance(block, cls) and type(block).__name__ == cls.__name__ and str(block).startswith(cls.__name__)
    assert list(dict(model.named_modules())) == names and isinstance(block.act2, nn.Identity)
    rows = {row.name: row.reason for row in audit(model)}
    assert rows["layer1.0.bn2"] == "replaced, with the residual of layer1.0 and the activation of layer1.0.act2"
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_residual_of_another_shape_or_dtype_is_added_as_torch_adds(backend: str) -> None:
    """Broadcast, and promoted, as under autocast with a shortcut in float32."""
    ops.set_backend(backend)
    try:
        norm = BatchNorm(6, act="relu").requires_grad_(False)
        x = torch.randn(2, 6, 3, 3, dtype=torch.bfloat16)
        for residual in (torch.randn(2, 6, 1, 1, dtype=torch.bfloat16), torch.randn(2, 6, 3, 3)):
            plain = nn.BatchNorm2d(6)(x)
            torch.testing.assert_close(norm(x, residual), (plain + residual).relu(), rtol=1e-2, atol=1e-2)
            assert norm(x, residual).dtype == residual.dtype
    finally:
        ops.set_backend("eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_gradient_that_only_the_residual_needs(backend: str) -> None:
    """A frozen branch beside a shortcut that learns."""
    ops.set_backend(backend)
    try:
        residual = torch.randn(2, 6, 3, 3, requires_grad=True)
        y = BatchNorm(6, act="relu").requires_grad_(False)(torch.randn(2, 6, 3, 3), residual)
        y.sum().backward()
        assert residual.grad is not None and torch.equal(residual.grad, (y > 0).float())
    finally:
        ops.set_backend("eager")

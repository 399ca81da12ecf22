"""`exnorm.testing`: every normalizer of exnorm passes its checks, and each check finds the class that breaks it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import varied
from norm_cases import NORMS, layer_of
from torch import Tensor, nn

from exnorm import ops
from exnorm.norms import BatchNorm, ExemplarNorm, LayerNorm, Moments, Norm
from exnorm.surgery import norm_class
from exnorm.testing import CHECKS, COMPILED_CHECKS, Layer, check_norm
from exnorm.testing.compiled_checks import compiles_as_one_graph, is_the_same_compiled
from exnorm.testing.data_checks import keeps_one_activation

torch.set_num_threads(1)
COMPILED = {check.__name__ for check in COMPILED_CHECKS}
EVERY = {check.__name__: check for check in CHECKS + COMPILED_CHECKS}


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    """The checks choose the compiled back end themselves."""
    with ops.using_backend("eager"):
        yield


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NORMS)
def test_every_normalizer_keeps_the_contract(name: str, check: Any) -> None:
    check(layer_of(name))


@pytest.mark.parametrize("name", NORMS)
def test_a_wide_layer_with_its_usual_options_keeps_one_activation(name: str) -> None:
    keeps_one_activation(Layer(norm_class(name), 64))


@pytest.mark.parametrize("name", varied(NORMS, always=["en"]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's compiler uses what torch 2.11 deprecates
def test_every_normalizer_compiles_as_one_graph(name: str) -> None:
    compiles_as_one_graph(layer_of(name))


@pytest.mark.slow
def test_a_normalizer_is_the_same_compiled() -> None:
    """`test_backends.py` compares all of them in more shapes."""
    is_the_same_compiled(layer_of("ln"))


class WrongDtype(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual).float()


class OneLayout(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x - x.mean(tuple(range(2, x.ndim)), keepdim=True)


class Contiguous(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual).contiguous()


class WrongGradient(LayerNorm):
    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        return super().coefficients(moments._replace(var_NC=moments.var_NC.detach()))


class NoResidual(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x)


class HalfPrecision(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x + 100, residual)


class Cancelling(LayerNorm):
    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        square_NC = moments.var_NC + moments.mean_NC.square()
        return super().coefficients(moments._replace(var_NC=square_NC - moments.mean_NC.square()))


class WithoutEps(Norm):
    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return weight_C * moments.var_NC.rsqrt(), bias_C.expand_as(moments.mean_NC)


class NeedsSamples(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual) + 0 * x.detach().max()


class AnyShape(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x - x.mean()


class ChangesItsInput(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x, residual)
        x.detach().mul_(2)
        return y


class KeepsItsOutput(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x, residual).tanh()


class CannotBePickled(LayerNorm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.function = lambda x: x


class KeepsATensor(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.last = x.detach()
        return super().forward(x, residual)


class NotReset(LayerNorm):
    def __init__(self, num_features: int, *, device: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, **options)
        self.extra = nn.Parameter(torch.ones(3, device=device))


class OwnDevice(LayerNorm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("extra", torch.ones(3))


class Counts(LayerNorm):
    def __init__(self, num_features: int, *, device: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, **options)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, residual)


class TwoOnes(ExemplarNorm):
    def ratios(self, moments: Moments) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in super().ratios(moments).items()}


class FewOptions(LayerNorm):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)


class MovesAtOnce(BatchNorm):
    def _record(self, mean_C: Tensor, var_C: Tensor) -> None:
        self.update_running_stats(mean_C, var_C)


class SeesTheBatch(Norm):
    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        scale_NC = weight_C * (moments.var_NC.mean(0, keepdim=True) + self.eps).rsqrt().expand_as(moments.mean_NC)
        return scale_NC, bias_C.expand_as(moments.mean_NC)


class ForgetsItsStatistics(BatchNorm):
    def constant_mean(self) -> Tensor | None:
        return None

    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        if self.training:
            return super().coefficients(moments)
        weight_C, bias_C = self.affine_parameters(moments.mean_NC)
        return weight_C.expand_as(moments.mean_NC), bias_C + moments.mean_NC


class Ordered(LayerNorm):
    def coefficients(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale_NC, shift_NC = super().coefficients(moments)
        return scale_NC * torch.arange(1, len(scale_NC) + 1, device=scale_NC.device)[:, None], shift_NC


class OtherCompiled(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x, residual)
        return 2 * y if ops.get_backend() == "compiled" else y


class BreaksGraphs(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x, residual)
        return y if float(x.detach().sum()) < 1e9 else 2 * y


class Unused(LayerNorm):
    def __init__(self, num_features: int, *, device: Any = None, dtype: Any = None, **options: Any) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        self.extra = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))


class OptionsOfNothing(LayerNorm):
    def param_options(self) -> dict[str, dict[str, float]]:
        return {"weight": {"lr": 0.1}}


BROKEN: dict[str, type[Norm]] = {
    "keeps_shape_and_dtype": WrongDtype,
    "puts_channels_last": OneLayout,
    "keeps_the_memory_format": Contiguous,
    "has_the_right_gradients": WrongGradient,
    "fuses_an_activation_and_a_residual": NoResidual,
    "computes_in_float32_under_autocast": HalfPrecision,
    "is_accurate_for_large_means": Cancelling,
    "is_finite_for_constant_inputs": WithoutEps,
    "is_finite_for_one_position_or_refuses_it": WithoutEps,
    "takes_empty_batches": NeedsSamples,
    "refuses_other_shapes": AnyShape,
    "gives_every_parameter_a_gradient": Unused,
    "leaves_its_input_alone": ChangesItsInput,
    "keeps_one_activation": KeepsItsOutput,
    "survives_copies": CannotBePickled,
    "keeps_no_tensor_as_an_attribute": KeepsATensor,
    "resets_every_value": NotReset,
    "has_the_dtype_and_device_that_it_is_given": OwnDevice,
    "names_options_of_its_own_parameters": OptionsOfNothing,
    "changes_nothing_in_evaluation": Counts,
    "has_ratios_that_sum_to_one": TwoOnes,
    "replaces_batch_normalization": FewOptions,
    "works_under_activation_checkpointing": MovesAtOnce,
    "treats_samples_alone_in_evaluation": SeesTheBatch,
    "treats_replicas_alone_in_training": SeesTheBatch,
    "gives_the_same_step_in_any_number_of_passes": SeesTheBatch,
    "moves_running_statistics_once_per_step": MovesAtOnce,
    "has_running_statistics_that_evaluation_uses": ForgetsItsStatistics,
    "ignores_the_order_of_samples_and_positions": Ordered,
    "is_the_same_compiled": OtherCompiled,
    "compiles_as_one_graph": BreaksGraphs,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in COMPILED else name for name in EVERY]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_check_finds_the_class_that_breaks_it(name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - a broken class may raise anything
        EVERY[name](Layer(BROKEN[name]))


def test_check_norm_says_what_must_hold_and_what_was_found() -> None:
    with pytest.raises(AssertionError) as caught:
        check_norm(Counts, compiled=False, eps=1e-3)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Counts fails ") and "checks of exnorm.testing" in lines[0]
    assert "* changes_nothing_in_evaluation: In evaluation the state stays as it is" in str(caught.value)
    assert caught.value.__cause__ is not None
    check_norm(LayerNorm, compiled=False, channels=5, eps=1e-3)
    for options in ({"momentum": 0.01}, {"track_running_stats": False}, {"sync": True}):
        check_norm(BatchNorm, compiled=False, **options)
    with pytest.raises(ValueError, match="leave out act: the checks try the values of act, affine"):
        check_norm(LayerNorm, act="relu")
    wrong: Any = nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"takes a subclass of exnorm\.norms\.Norm, not .*BatchNorm2d"):
        check_norm(wrong)

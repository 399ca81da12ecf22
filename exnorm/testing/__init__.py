"""Check a normalizer of your own: what the engine, the studies and `exnorm.convert` rely on.

    from exnorm.testing import check_norm

    def test_my_norm() -> None:
        check_norm(MyNorm, alpha=0.5)

`CHECKS` has the single checks, for `pytest.mark.parametrize`; each takes a `Layer`. The checks need torch alone.
"""

import functools
import inspect
from typing import Any

from exnorm.norms import Norm
from exnorm.ops import using_backend
from exnorm.testing import compiled_checks, data_checks, scope_checks, state_checks
from exnorm.testing.layers import Check, Layer

ROOMS = (data_checks, state_checks, scope_checks)
SET_BY_CHECKS = ("act", "affine", "channel_dim", "device", "dtype")


def _eagerly(check: Check) -> Check:
    @functools.wraps(check)
    def run(layer: Layer) -> None:
        with using_backend("eager"):
            check(layer)

    return run


CHECKS: tuple[Check, ...] = tuple(_eagerly(check) for room in ROOMS for check in room.CHECKS)
COMPILED_CHECKS: tuple[Check, ...] = compiled_checks.CHECKS

__all__ = ["CHECKS", "COMPILED_CHECKS", "Layer", "check_norm"]


def check_norm(norm: type[Norm], *, channels: int = 12, compiled: bool = True, **options: Any) -> None:
    """Check that a class keeps the contract of `exnorm.norms.Norm`, in a few seconds on a CPU.

    Args:
        norm: the class.
        channels: of the layers that are checked, for classes that need a certain number.
        compiled: also compare the compiled layer with the eager one, which takes about a minute the first time.
        options: keyword arguments of the class.

    Raises:
        AssertionError: with a line for each check that failed, which says what must hold and what was found.
        TypeError: `norm` is not a subclass of `Norm`.
        ValueError: an option that the checks set themselves.
    """
    if not (inspect.isclass(norm) and issubclass(norm, Norm)):
        raise TypeError(f"check_norm takes a subclass of exnorm.norms.Norm, not {norm!r}")
    if given := [name for name in SET_BY_CHECKS if name in options]:
        raise ValueError(f"leave out {', '.join(given)}: the checks try the values of {', '.join(SET_BY_CHECKS)}")
    layer = Layer(norm, channels, options)
    checks = CHECKS + (COMPILED_CHECKS if compiled else ())
    failed = {check: problem for check in checks if (problem := _problem(check, layer)) is not None}
    if failed:
        lines = [f"{norm.__name__} fails {len(failed)} of {len(checks)} checks of exnorm.testing:"]
        lines += [
            f"* {check.__name__}: {inspect.getdoc(check)}\n  {_text(problem)}" for check, problem in failed.items()
        ]
        raise AssertionError("\n".join(lines)) from next(iter(failed.values()))


def _problem(check: Check, layer: Layer) -> Exception | None:
    try:
        check(layer)
    except Exception as problem:  # noqa: BLE001 - a class under test may raise anything
        return problem
    return None


def _text(problem: Exception) -> str:
    lines = [line for line in str(problem).splitlines() if line.strip()]
    text = "\n  ".join(lines[:4])
    return text if isinstance(problem, AssertionError) and text else f"{type(problem).__name__}: {text}"

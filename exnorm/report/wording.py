"""A comparison in words: `norm=sn > norm=bn at batch=8x2`. What all of its cells share is said once, at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from exnorm.config.study import Study, cell_name, compared_cells

Selector = Mapping[Any, Any]


def written_comparison(study: Study, left: Any, sign: str, right: Any) -> str:
    """Return a comparison, with the stand-ins of this scale for backbones and data.

    Args:
        left, right: as in the study's yaml: a cell, `[[weight, cell], ...]`, or a number.
    """
    shared = _shared([*compared_cells(left), *compared_cells(right)])
    sides = (_side(study, side, shared) for side in (left, right))
    return f" {sign} ".join(sides) + _at(study, shared)


def written_cells(study: Study, cells: Selector) -> str:
    """Return the axes that a selector of cells names, with their values."""
    return cell_name((str(axis), study.label(str(value))) for axis, value in cells.items())


def _side(study: Study, side: Any, said: Selector) -> str:
    if isinstance(side, int | float):
        return f"{side:g}"
    if isinstance(side, Mapping):
        return written_cells(study, _without(side, said))
    cells = [_without(cell, said) for _, cell in side]
    shared = _shared(cells)
    signs = ["-" if weight < 0 else "+" for weight, _ in side]
    factors = ["" if abs(weight) == 1 else f"{abs(weight):g} * " for weight, _ in side]
    names = [written_cells(study, _without(cell, shared)) for cell in cells]
    terms = " ".join(map("{} {}{}".format, signs, factors, names)).removeprefix("+ ")
    return f"({terms}{_at(study, shared)})"


def _shared(cells: Sequence[Selector]) -> Selector:
    """Return what all cells have, if each has something of its own besides."""
    first, *others = cells or [{}]
    shared = {axis: value for axis, value in first.items() if all(cell.get(axis) == value for cell in others)}
    return shared if all(len(cell) > len(shared) for cell in cells) else {}


def _without(cell: Selector, said: Selector) -> Selector:
    return {axis: value for axis, value in cell.items() if axis not in said}


def _at(study: Study, shared: Selector) -> str:
    return f" at {written_cells(study, shared)}" if shared else ""

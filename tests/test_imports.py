"""Imports without garbage collection."""

import gc

import pytest

from exnorm.runs.imports import uncollected


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_is_not_collected_during_imports_and_afterwards_as_before(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == was_on
        with pytest.raises(ZeroDivisionError), uncollected():
            1 / 0  # noqa: B018  # an import may fail
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()

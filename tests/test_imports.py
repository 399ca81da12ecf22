"""Imports without garbage collection."""

import gc

import pytest

from exnorm.runs.imports import uncollected


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_is_not_collected_during_imports_and_afterwards_as_before(was_on: bool) -> None:
    """Also if an import fails."""
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()

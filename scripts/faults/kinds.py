"""The kinds of fault, by name. `faults/*.py` register theirs with `@kind`."""

from collections.abc import Callable
from dataclasses import dataclass

from faults.cases import COMMANDS, Case

BIT_EQUAL = "bit-equal"  # the same command ended the run, with the same bits
ONE_LINE = "one line"  # the command refused with one line until the user had repaired what it said; then bit-equal
Inject = Callable[[Case], str]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        inject: starts the command of a case, lets the fault happen, takes its cause away, and starts the command again
            until it has ended well. It returns BIT_EQUAL or ONE_LINE and raises FellShort.
        needs_root: it mounts something.
        logger: the logger of the command.
    """

    name: str
    inject: Inject
    commands: tuple[str, ...]
    needs_root: bool
    logger: str

    @property
    def about(self) -> str:
        """What happens, in one line."""
        return (self.inject.__doc__ or "").splitlines()[0]


KINDS: dict[str, Kind] = {}


def kind(
    name: str, *, commands: tuple[str, ...] = COMMANDS, needs_root: bool = False, logger: str = "off"
) -> Callable[[Inject], Inject]:
    """Register a function as a kind of fault."""

    def register(inject: Inject) -> Inject:
        KINDS[name] = Kind(name, inject, commands, needs_root, logger)
        return inject

    return register

"""Count warnings that come once per image or once per process, and print one line for each kind.

Pillow warns about damaged metadata in images that it reads correctly. PyTorch warns about CUDA in every process on a
machine whose driver does not fit. Processes that are forked inside the block add to the same counts.
"""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHOWN = 200  # bytes of the first warning
CUDA = ("cuda", "accelerator", "nvidia")  # a word in every such warning of PyTorch


class _Count:
    """The number of warnings of one kind in all processes, and the first of them."""

    def __init__(self, name: str, belongs: Callable[[str, type[Warning], str], bool]) -> None:
        self.name, self.belongs = name, belongs
        self.number: Any = multiprocessing.Value("q", 0)
        self.first: Any = multiprocessing.Array("c", SHOWN)

    def add(self, text: str) -> None:
        """Count a warning."""
        with self.number.get_lock():
            self.number.value += 1
            if self.number.value == 1:
                self.first.value = " ".join(text.split()).encode()[: SHOWN - 1]

    def line(self) -> str:
        """Return the number of warnings and the first one."""
        times = "once" if self.number.value == 1 else f"{self.number.value} times, first"
        return f"{self.name} warned {times}: {self.first.value.decode(errors='ignore')}"


def _of_pillow(text: str, category: type[Warning], file: str) -> bool:
    return "PIL" in Path(file).parts and issubclass(category, UserWarning | RuntimeWarning)


def _of_cuda(text: str, category: type[Warning], file: str) -> bool:
    return any(word in text.lower() for word in CUDA) and issubclass(category, UserWarning)


@contextmanager
def counted_warnings(*, printed: bool = True) -> Iterator[None]:
    """Count the warnings of Pillow and of CUDA inside the block; at its end print a line for each kind that occurred.

    Args:
        printed: False in all processes of a run except the first; their warnings are the same.
    """
    counts = [_Count("Pillow", _of_pillow), _Count("CUDA", _of_cuda)]
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.filterwarnings("always", module=r"PIL\.", category=category)
        warnings.filterwarnings("always", message=rf"(?is).*({'|'.join(CUDA)})", category=UserWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
            for count in counts:
                if count.belongs(str(message), category, filename):
                    count.add(str(message))
                    return
            shown(message, category, filename, *more)

        warnings.showwarning = show
        try:
            yield
        finally:
            for count in counts:
                if printed and count.number.value:
                    print(count.line(), flush=True)

"""Draw the images of a plan into a file, in this process or in another one.

A plan is a NamedTuple of JSON's values, one of them a `style`. The module that defines its type draws it. It has

    VERSION             another number for other bytes
    Plan                the type of the plan
    shape(plan)         of an image as an array in uint8
    draw(plan, index)   that array; it depends on the plan and the index alone

`python -m exnorm.data.painter MODULE PLAN FILE OFFSET START STOP` draws the images START to STOP into a file, and ends
when its standard input closes.
"""

import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from exnorm.data.drawing import style_of
from exnorm.runs.subprocesses import end_with_parent


def module_of(plan: Any) -> ModuleType:
    """Return the module that draws a plan."""
    return sys.modules[type(plan).__module__]


def image_bytes(plan: Any) -> int:
    """Return the size of one image of a plan."""
    return math.prod(module_of(plan).shape(plan))


def draw_into(plan: Any, file: Path, offset: int, start: int, stop: int) -> None:
    """Draw the images `start` to `stop` into a file in which image 0 begins at `offset` bytes."""
    with file.open("r+b") as target:
        target.seek(offset + start * image_bytes(plan))
        for index in range(start, stop):
            target.write(module_of(plan).draw(plan, index).tobytes())


def command(plan: Any, file: Path, offset: int, start: int, stop: int) -> list[str]:
    """Return the command that does in another process what `draw_into` does in this one."""
    numbers = [str(number) for number in (offset, start, stop)]
    return [sys.executable, "-m", "exnorm.data.painter", type(plan).__module__, json.dumps(plan), str(file), *numbers]


def main(arguments: Sequence[str]) -> None:
    """Run the command in the module's docstring."""
    end_with_parent()
    module, values, file, *numbers = arguments
    plan = importlib.import_module(module).Plan(*json.loads(values))
    draw_into(plan._replace(style=style_of(plan.style)), Path(file), *map(int, numbers))


if __name__ == "__main__":
    main(sys.argv[1:])

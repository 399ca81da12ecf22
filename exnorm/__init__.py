"""exnorm: learning to normalize. `import exnorm` does not import torch; the first use of a function does.

model = exnorm.convert(timm.create_model("resnet18"), norm="en")
print(exnorm.audit(model))
model = exnorm.load(RUN_DIR)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exnorm.analysis.ratios import ratios
    from exnorm.engine.checkpoint import load
    from exnorm.surgery import audit, convert, convert_sync, fold, freeze, recalibrate

__version__ = "0.1.0"
__all__ = ["audit", "convert", "convert_sync", "fold", "freeze", "load", "ratios", "recalibrate"]

ROOMS = dict.fromkeys(__all__, "exnorm.surgery") | {
    "load": "exnorm.engine.checkpoint",
    "ratios": "exnorm.analysis.ratios",
}
PACKAGES = ("norms", "ops", "surgery", "testing")


def __getattr__(name: str) -> Any:
    """Import a public function or package at its first use."""
    if name in PACKAGES:
        return import_module(f"exnorm.{name}")
    if name not in ROOMS:
        raise AttributeError(f"module 'exnorm' has no attribute '{name}': it has {', '.join(__all__)}")
    return getattr(import_module(ROOMS[name]), name)

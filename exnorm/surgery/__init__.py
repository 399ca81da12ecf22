"""Put a normalizer into any model: replace its normalization layers, and report what was replaced."""

from exnorm.surgery.audit_rows import Audit, AuditRow
from exnorm.surgery.folding import fold
from exnorm.surgery.kinds import KINDS
from exnorm.surgery.layers import audit, constructor_options, convert, norm_class
from exnorm.surgery.modes import convert_sync, freeze, recalibrate

__all__ = [
    "KINDS",
    "Audit",
    "AuditRow",
    "audit",
    "constructor_options",
    "convert",
    "convert_sync",
    "fold",
    "freeze",
    "norm_class",
    "recalibrate",
]

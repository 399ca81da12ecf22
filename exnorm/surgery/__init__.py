"""Put a normalizer into any model: replace its normalization layers, and say what was replaced."""

from exnorm.surgery.layers import KINDS, AuditRow, audit, constructor_options, convert, norm_class

__all__ = ["KINDS", "AuditRow", "audit", "constructor_options", "convert", "norm_class"]

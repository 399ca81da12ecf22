"""The result of `audit`: a row for each normalization layer, and a note on functions that skip exnorm's layers."""

from typing import NamedTuple

NOTE = (
    "Functions that look for torch's batch normalization skip these layers: use exnorm.freeze, exnorm.recalibrate and "
    "exnorm.convert_sync instead of freeze_batch_norm_2d, update_bn and convert_sync_batchnorm."
)

FOLDED = "folded into"  # the start of the reason of a folded layer


class AuditRow(NamedTuple):
    """One normalization layer of a model: its original type, its replacement (None if it was left), and the reason."""

    name: str
    original: str
    replacement: str | None
    reason: str


class Audit(list[AuditRow]):
    """The rows of an audit. Printing it gives one line per row."""

    def __str__(self) -> str:
        lines = [f"{row.name}: {row.original} -> {row.replacement or 'left'} ({row.reason})" for row in self]
        return "\n".join(
            lines + [NOTE] * any(row.replacement is not None and not row.reason.startswith(FOLDED) for row in self)
        )

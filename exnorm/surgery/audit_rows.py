"""What `audit` says: a row for each normalization layer, and how to treat those of exnorm."""

from typing import NamedTuple

NOTE = (
    "Functions that look for torch's batch normalization pass over these layers: use exnorm.freeze, exnorm.recalibrate "
    "and exnorm.convert_sync in place of freeze_batch_norm_2d, update_bn and convert_sync_batchnorm."
)


class AuditRow(NamedTuple):
    """One normalization layer of a model: what it was, what it is now (None if left), and why."""

    name: str
    original: str
    replacement: str | None
    reason: str


class Audit(list[AuditRow]):
    """The rows; printed, a line for each."""

    def __str__(self) -> str:
        lines = [f"{row.name}: {row.original} -> {row.replacement or 'left'} ({row.reason})" for row in self]
        return "\n".join(lines + [NOTE] * any(row.replacement is not None for row in self))

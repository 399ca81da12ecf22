"""The normalizers, one file each. All apply the same affine map, with different coefficients (`exnorm.norms.base`)."""

from exnorm.norms.base import Norm, install
from exnorm.norms.batch_norm import BatchNorm
from exnorm.norms.batch_renorm import BatchRenorm
from exnorm.norms.batch_scope import (
    BatchScopeNorm,
    commit_running_stats,
    configure_scope,
)
from exnorm.norms.compiled import normalize
from exnorm.norms.exemplar_norm import ExemplarNorm
from exnorm.norms.group_norm import GroupNorm
from exnorm.norms.instance_norm import InstanceNorm
from exnorm.norms.layer_norm import LayerNorm
from exnorm.norms.progress import progress_buffers, set_progress
from exnorm.norms.sparse_switch_norm import SparseSwitchNorm
from exnorm.norms.statistics import Moments
from exnorm.norms.switch_norm import SwitchNorm

install(normalize)

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "BatchScopeNorm",
    "ExemplarNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "Norm",
    "SparseSwitchNorm",
    "SwitchNorm",
    "commit_running_stats",
    "configure_scope",
    "progress_buffers",
    "set_progress",
]

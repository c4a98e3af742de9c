"""Retaining-head scores of tokens."""

from pallas_kernels.retaining_score.api import IMPLEMENTATIONS, retaining_score
from pallas_kernels.retaining_score.call import RowLimits, pool_and_mask

__all__ = ["IMPLEMENTATIONS", "RowLimits", "pool_and_mask", "retaining_score"]

"""Attention over row intervals (prefill, ring steps, query phase)."""

from pallas_kernels.flash_attention.api import IMPLEMENTATIONS, flash_attention
from pallas_kernels.flash_attention.rows import RowSegment

__all__ = ["IMPLEMENTATIONS", "RowSegment", "flash_attention"]

"""A few rows times matrices of one layer of their stacks (the projections of a decoding step)."""

from pallas_kernels.skinny_matmul.api import IMPLEMENTATIONS, skinny_matmul

__all__ = ["IMPLEMENTATIONS", "skinny_matmul"]

"""Causal attention over chosen windows and columns of keys."""

from pallas_kernels.block_sparse_attention.api import IMPLEMENTATIONS, Blocks, KeyTiles, block_sparse_attention

__all__ = ["IMPLEMENTATIONS", "Blocks", "KeyTiles", "block_sparse_attention"]

"""Attention of few rows over a long cache (decoding, query phase)."""

from pallas_kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention

__all__ = ["IMPLEMENTATIONS", "decode_attention"]

"""Attention of few rows over a long cache (decoding, query phase)."""

from pallas_kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention
from pallas_kernels.decode_attention.call import Codes

__all__ = ["IMPLEMENTATIONS", "Codes", "decode_attention"]

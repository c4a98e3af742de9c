"""Attention of few rows over a long cache (decoding, query phase)."""

from pallas_kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention, decode_parts
from pallas_kernels.decode_attention.call import Codes
from pallas_kernels.decode_attention.parts import Parts

__all__ = ["IMPLEMENTATIONS", "Codes", "Parts", "decode_attention", "decode_parts"]

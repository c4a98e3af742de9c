"""Top-k selection per KV head with gather of keys and values."""

from pallas_kernels.select.api import IMPLEMENTATIONS, select_topk

__all__ = ["IMPLEMENTATIONS", "select_topk"]

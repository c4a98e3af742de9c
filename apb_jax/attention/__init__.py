"""Attention methods: one file each, reached by name through the registry."""

from apb_jax.attention.apb import APB
from apb_jax.attention.base import AttentionMethod, Capabilities, Kernels, Layout, Prompt, Shard
from apb_jax.attention.full import Full
from apb_jax.attention.registry import METHODS, MethodSpec

__all__ = [
    "APB", "METHODS", "AttentionMethod", "Capabilities", "Full", "Kernels", "Layout", "MethodSpec", "Prompt", "Shard",
]  # fmt: skip

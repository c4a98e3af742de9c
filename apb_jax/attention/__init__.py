"""Attention methods: one file each, reached by name through the registry."""

from apb_jax.attention.apb import APB
from apb_jax.attention.full import Full
from apb_jax.attention.inputs import Kernels, Prompt, Shard
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod, Capabilities
from apb_jax.attention.registry import METHODS, MethodSpec

__all__ = [
    "APB", "METHODS", "AttentionMethod", "Capabilities", "Full", "Kernels", "Layout", "MethodSpec", "Prompt", "Shard",
]  # fmt: skip

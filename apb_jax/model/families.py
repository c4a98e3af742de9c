"""The families of models: a row for each ``model_type``, with what transformers assumes where its config is silent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What all models of a ``model_type`` share, and transformers' defaults for absent or null keys."""

    architecture: str
    """transformers' class is this with "ForCausalLM"."""
    max_positions: int
    kv_heads: int | None = None
    """Where ``num_key_value_heads`` is absent; None: as many as query heads."""
    head_dim: int | None = None
    """Where ``head_dim`` is absent; None: hidden size / heads."""
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding: str | None = None
    """Layers that ``sliding_window`` is about: "all", "upper" (from ``max_window_layers`` on); None: no such key."""
    some_without_rope: bool = False
    """Whether ``no_rope_layers`` (1: with RoPE) and ``no_rope_layer_interval`` name layers without positions."""
    theta: float = 10000.0
    tie_embeddings: bool = False


FAMILIES = {
    "llama": Family("Llama", 2048),
    "mistral": Family("Mistral", 131072, kv_heads=8, sliding="all"),
    "qwen2": Family("Qwen2", 32768, kv_heads=32, qkv_bias=True, sliding="upper"),
    "qwen3": Family("Qwen3", 32768, kv_heads=32, head_dim=128, qk_norm=True, sliding="upper"),
    "smollm3": Family("SmolLM3", 32768, kv_heads=4, some_without_rope=True, theta=2000000.0, tie_embeddings=True),
}
"""By ``model_type``; the defaults are those of transformers 5.24."""

SLIDING_WINDOW, MAX_WINDOW_LAYERS = 4096, 28
"""transformers' defaults of the keys ``sliding_window`` and ``max_window_layers``."""
NO_ROPE_INTERVAL = 4
"""transformers' default of ``no_rope_layer_interval``: every fourth layer has no positions."""

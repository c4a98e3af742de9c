"""The models: configuration, RoPE, layers, transformer. Flax (nnx) lives here only."""

from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import LayerInputs
from apb_jax.model.transformer import Transformer

__all__ = ["LayerInputs", "ModelConfig", "Transformer"]

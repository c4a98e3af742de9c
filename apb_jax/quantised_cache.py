"""The document's KV in 8 bits: codes and scales, quantised once, when a layer's prefill ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from apb_jax.attention.inputs import CachedLayer
from apb_jax.cache import DocumentCache, LayerKV
from apb_jax.kv_codes import CODES, code_of, quantise
from apb_jax.mesh import SP, TP
from apb_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantisedCache(LayerKV):
    """As ``DocumentCache``, with codes of `kv_codes` for K (after RoPE) and V, and a scale a token and KV head."""

    k: Shaped[Array, "L B rows K D"]
    v: Shaped[Array, "L B rows K D"]
    k_scale: Float[Array, "L B rows K"]
    v_scale: Float[Array, "L B rows K"]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, rows: int, dtype: Any, layers: int | None = None) -> QuantisedCache:
        """An empty cache of all layers or so many; ``rows`` over all shards, ``dtype`` of the codes."""
        shape = (layers or config.num_layers, batch, rows, config.num_kv_heads)
        codes = jnp.zeros((*shape, config.head_dim), dtype)
        scales = jnp.ones(shape, jnp.float32)
        return cls(codes, jnp.zeros_like(codes), scales, jnp.ones_like(scales))

    @staticmethod
    def specs() -> QuantisedCache:
        """Rows over ``sp``, heads over ``tp``."""
        codes, scales = PartitionSpec(None, None, SP, TP, None), PartitionSpec(None, None, SP, TP)
        return QuantisedCache(codes, codes, scales, scales)  # type: ignore[arg-type]

    def at(self, layer: Int[Array, ""]) -> CachedLayer:
        """One layer, where it lies."""
        return CachedLayer(self.k, self.v, layer, self.k_scale, self.v_scale)

    def write(self, layer: Int[Array, ""], k: Float[Array, "B C K D"], v: Float[Array, "B C K D"]) -> QuantisedCache:
        """This cache with one layer replaced by the codes of these keys and values."""
        code = code_of(self.k.dtype)
        (k_codes, k_scale), (v_codes, v_scale) = quantise(k, code), quantise(v, code)
        return self.replaced(layer, k=k_codes, v=v_codes, k_scale=k_scale, v_scale=v_scale)


AnyCache = DocumentCache | QuantisedCache


def cache_kind(kv: str) -> type[AnyCache]:
    """The cache's type for the word of ``Precision.kv``."""
    return QuantisedCache if kv in CODES else DocumentCache


def cache_dtype(kv: str, model: Any) -> Any:
    """The type of cached keys and values; ``model``: that of the model."""
    return CODES[kv].dtype if kv in CODES else model

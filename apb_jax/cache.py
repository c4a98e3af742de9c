"""The KV cache: document KV sharded over the sequence axis, and a short tail for query and generated tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import CachedLayer
from apb_jax.mesh import SP, TP
from apb_jax.model.config import ModelConfig


@dataclass(frozen=True)
class LayerKV:
    """K (after RoPE) and V of all layers, [L, B, rows, K, D]."""

    k: Float[Array, "L B rows K D"]
    v: Float[Array, "L B rows K D"]

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, rows: int, dtype: Any, layers: int | None = None) -> Self:
        """An empty cache of all layers or so many; ``rows`` over all shards."""
        shape = (layers or config.num_layers, batch, rows, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def layers(self) -> int:
        """Layers that are held here."""
        return int(self.k.shape[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer, K and V."""
        return sum(math.prod(array.shape[3:]) * array.dtype.itemsize for array in vars(self).values())

    @property
    def addressable(self) -> bool:
        """Whether this process sees all of it."""
        return bool(self.k.is_fully_addressable)

    def on_host(self, layer: int) -> dict[str, np.ndarray]:
        """One layer's arrays [B, rows, K, ...] by field, from wherever their rows and heads lie."""
        return {name: _on_host(array, layer) for name, array in vars(self).items()}

    def replaced(self, layer: Int[Array, ""], **parts: Array) -> Self:
        """This cache with one layer of every array as given, by field."""
        put = jax.lax.dynamic_update_index_in_dim
        return replace(self, **{name: put(getattr(self, name), part, layer, 0) for name, part in parts.items()})

    def at(self, layer: Int[Array, ""]) -> CachedLayer:
        """One layer, where it lies."""
        return CachedLayer(self.k, self.v, layer)


def _on_host(array: jax.Array, layer: int) -> np.ndarray:
    parts = array.addressable_shards
    if len(parts) == 1:
        return np.asarray(parts[0].data[layer])
    whole = np.empty(array.shape[1:], array.dtype)
    for part in parts:
        whole[part.index[1:]] = np.asarray(part.data[layer])
    return whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DocumentCache(LayerKV):
    """The document's KV; global rows = shards x cache capacity, each shard's padding at its end."""

    @staticmethod
    def specs() -> DocumentCache:
        """Rows over ``sp``, heads over ``tp``."""
        spec = PartitionSpec(None, None, SP, TP, None)
        return DocumentCache(spec, spec)  # type: ignore[arg-type]

    def write(self, layer: Int[Array, ""], k: Float[Array, "B C K D"], v: Float[Array, "B C K D"]) -> DocumentCache:
        """This cache with one layer replaced."""
        return self.replaced(layer, k=k, v=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TailCache(LayerKV):
    """KV of the query and the answer so far; every shard computes and holds it, the last shard counts it.

    Slot j holds tail token j: a request's query occupies 0..m-1, its t-th generated token slot m + t.
    """

    @staticmethod
    def specs() -> TailCache:
        """Replicated over ``sp``, heads over ``tp``."""
        spec = PartitionSpec(None, None, None, TP, None)
        return TailCache(spec, spec)  # type: ignore[arg-type]

    def write(
        self,
        layer: Int[Array, ""],
        slot: Int[Array, " B"],
        k: Float[Array, "B M K D"],
        v: Float[Array, "B M K D"],
    ) -> TailCache:
        """This cache with M slots of one layer written, starting at each request's ``slot``."""
        if k.shape[0] == 1:  # slots of one request are one slice, which XLA writes in one launch
            start = (layer, 0, slot[0], 0, 0)
            put = lambda a, new: jax.lax.dynamic_update_slice(a, new[None], start)  # noqa: E731
        else:
            batch = jnp.arange(k.shape[0])[:, None]
            slots = slot[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None]
            put = lambda a, new: a.at[layer, batch, slots].set(new)  # noqa: E731
        return TailCache(put(self.k, k), put(self.v, v))

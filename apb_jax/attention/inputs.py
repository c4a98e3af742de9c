"""What an attention method is given: the shard's place, one layer's projections, the cache. A leaf: no method in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from apb_jax.attention.placement import Placement
from apb_jax.errors import UserError
from apb_jax.kv_codes import dequantise
from apb_jax.precision import MODEL
from apb_jax.rope.base import Rope, rotate
from apb_jax.typed import check_types
from pallas_kernels.decode_attention import Codes
from pallas_kernels.flash_attention import IMPLEMENTATIONS
from pallas_kernels.flash_attention.eight_bit import EightBit

KeptKV = tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]


@dataclass(frozen=True)
class Kernels:
    """Which implementations the ops of ``pallas_kernels`` use; None lets each op choose."""

    attention: str | None = None
    exchange: str = MODEL
    """In which type APB's keys and values travel between shards: the word of ``Precision.kv``."""
    eight: EightBit | None = None
    """Which products of the prefill's attention take 8-bit operands; None: none."""

    def __post_init__(self) -> None:
        check_types(self)
        names = [one.name for one in IMPLEMENTATIONS]
        if self.attention is not None and self.attention not in names:
            raise UserError(f"--kernels {self.attention!r} is unknown; choose one of auto, {', '.join(names)}")


DEFAULT_KERNELS = Kernels()
"""Every op chooses; no product in 8 bits."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request: document, full query, and the clean query that may be embedded in an anchor."""

    document: np.ndarray
    query: np.ndarray
    embedded_query: np.ndarray

    def __post_init__(self) -> None:
        for name in ("document", "query", "embedded_query"):
            ids = getattr(self, name)
            if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
                kind = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
                raise UserError(f"{name} is {kind}; a Prompt holds one-dimensional arrays of token ids (Engine.prompt)")
            if not len(ids) and name != "embedded_query":
                raise UserError(f"the {name} has 0 tokens; it needs at least 1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shard:
    """A shard's place inside ``shard_map``: its index on the sequence axis and the lengths of the requests."""

    index: Int[Array, ""]
    block_rows: Int[Array, " B"]
    document_tokens: Int[Array, " B"]
    embedded_query_tokens: Int[Array, " B"]
    query_tokens: Int[Array, " B"]
    placement: Placement = field(metadata={"static": True})
    """Which shards stand where, and the collectives over them."""
    segments: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})
    """Those of the layout, in prefill."""

    @property
    def count(self) -> int:
        """Shards of the document."""
        return self.placement.shards


class Scorer(Protocol):
    """A layer's retaining head, however its weights are kept: hidden values from q, k, v before RoPE, then fc2."""

    @property
    def fc2(self) -> Float[Array, "F K"]: ...

    def hidden(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        tp_axis: str | None = None,
    ) -> Float[Array, "B S F"]:
        """fc1(concat(q, k, v)) before the activation."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What one attention layer gets: projections before RoPE (local rows and heads), how to rotate and score them."""

    q: Float[Array, "B S H D"]
    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K D"]
    cos: Float[Array, "B S Dhalf"]
    sin: Float[Array, "B S Dhalf"]
    layer: Int[Array, ""]
    retaining: Scorer | None
    positions: Int[Array, "B S"]
    rope: Rope = field(metadata={"static": True})
    tp_axis: str | None = field(default=None, metadata={"static": True})

    def rotated(self) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"]]:
        """q and k at their positions."""
        return rotate(self.q, self.cos, self.sin), rotate(self.k, self.cos, self.sin)


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a cache, left in its stack: few rows attend to it where it lies."""

    k: Shaped[Array, "L B rows K D"]
    v: Shaped[Array, "L B rows K D"]
    layer: Int[Array, ""]
    k_scale: Float[Array, "L B rows K"] | None = None
    """Given, like ``v_scale``, where keys and values are 8-bit codes (``kv_codes.py``)."""
    v_scale: Float[Array, "L B rows K"] | None = None

    def stacks(self) -> tuple[Any, Any]:
        """K and V of all layers as ``decode_attention`` takes them."""
        if self.k_scale is None or self.v_scale is None:
            return self.k, self.v
        return Codes(self.k, self.k_scale), Codes(self.v, self.v_scale)

    def alone(self, dtype: Any) -> tuple[Float[Array, "B rows K D"], Float[Array, "B rows K D"]]:
        """K and V of this layer, as copies unless XLA fuses them; codes as the values in ``dtype`` they stand for."""

        def take(array: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False)

        if self.k_scale is None or self.v_scale is None:
            return take(self.k), take(self.v)
        return dequantise(take(self.k), take(self.k_scale), dtype), dequantise(take(self.v), take(self.v_scale), dtype)

    @classmethod
    def of(cls, k: Float[Array, "B rows K D"], v: Float[Array, "B rows K D"]) -> CachedLayer:
        """K and V as the only layer of a stack."""
        return cls(k[None], v[None], jnp.int32(0))


@dataclass(frozen=True)
class Cached:
    """What the rows of a query or decoding step may see in one layer, on one shard."""

    document: CachedLayer
    kept_tokens: Int[Array, " B"]
    """Rows of ``document`` that exist."""
    kept_positions: Int[Array, "B C"]
    tail: CachedLayer
    """Query and answer so far, counted by the last shard only; row i sees slots j <= i + ``tail_offset``."""
    tail_offset: Int[Array, " B"]
    tail_position: Int[Array, " B"]
    """Position of tail slot 0."""
    rows: Int[Array, " B"]
    """Rows of this step that exist: the query's tokens, or 1."""
    query_tokens: Int[Array, " B"] | None
    """Given where the originals' quirk of the query phase is asked for (see ``attend_shard``)."""

"""Queries and keys of a layer, and attention between them: through the kernels, or under a rope that remaps positions.

Methods move, split and exchange ``Queries`` and ``Keys`` as pytrees; whether a rope such as STRING needs a second
rotation of the queries and the keys' positions beside them is decided here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import DEFAULT_KERNELS, Kernels, LayerInputs
from apb_jax.attention.remapped import Border, Interval, remapped_attention
from apb_jax.rope.base import rope_table, rotate
from apb_jax.rope.string import StringRope
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.flash_attention.rows import row_bounds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queries:
    """Rotated queries; under STRING also their rotation for far keys, and their positions."""

    near: Float[Array, "B S H D"]
    far: Float[Array, "B S H D"] | None = None
    positions: Int[Array, "B S"] | None = None
    rope: StringRope | None = field(default=None, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.near.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys:
    """Rotated keys and values; under STRING also their positions, [B, T] or per KV head [B, T, K]."""

    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]
    positions: Int[Array, "..."] | None = None

    @property
    def tokens(self) -> int:
        return self.k.shape[1]


def project(x: LayerInputs) -> tuple[Queries, Keys]:
    """A layer's queries and keys at their positions."""
    q, k = x.rotated()
    if not isinstance(x.rope, StringRope):
        return Queries(q), Keys(k, x.v)
    far = rotate(x.q, *rope_table(x.rope, x.q.shape[-1], x.positions + jnp.int32(x.rope.shift)))
    return Queries(q, far, x.positions, x.rope), Keys(k, x.v, x.positions)


def attend(
    queries: Queries, ranges: Sequence[Keys], rows: Sequence[RowSegment], kernels: Kernels = DEFAULT_KERNELS
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """(out in the queries' dtype, lse_nat) of ``flash_attention``'s row intervals over up to three key ranges."""
    k, v = tuple(r.k for r in ranges), tuple(r.v for r in ranges)
    if queries.rope is None:
        return flash_attention(queries.near, k, v, tuple(rows), implementation=kernels.attention, eight=kernels.eight)
    assert queries.far is not None
    assert queries.positions is not None
    keys = jnp.concatenate(k, axis=1)
    seen = Interval(*row_bounds(rows, keys.shape[0], keys.shape[1]))
    shape = keys.shape[:3]
    places = [jnp.broadcast_to(r.positions if r.positions.ndim == 3 else r.positions[..., None], r.k.shape[:3])
              for r in ranges if r.positions is not None]  # fmt: skip
    positions = jnp.concatenate(places, axis=1)
    assert positions.shape == shape
    out, lse = remapped_attention(
        queries.near,
        queries.far,
        keys,
        jnp.concatenate(v, axis=1),
        queries.positions,
        positions,
        seen,
        Border(queries.rope.offset, queries.rope.border_twice),
    )
    return out.astype(queries.near.dtype), lse


def rows_of(queries: Queries, start: int, stop: int) -> Queries:
    """Rows ``start`` to ``stop`` of the queries."""
    return jax.tree.map(lambda a: a[:, start:stop], queries)


def keys_of(keys: Keys, start: int, stop: int) -> Keys:
    """Keys ``start`` to ``stop``."""
    return jax.tree.map(lambda a: a[:, start:stop], keys)

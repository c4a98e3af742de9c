"""Causal attention of consecutive rows over themselves, also under STRING through the kernels."""

from __future__ import annotations

from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, Queries, attend
from apb_jax.attention.inputs import DEFAULT_KERNELS, Kernels
from apb_jax.attention.merge import merge_partials
from apb_jax.attention.window import sliding_window
from pallas_kernels.flash_attention import RowSegment


def causal(
    queries: Queries, keys: Keys, kernels: Kernels = DEFAULT_KERNELS
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """(out in the queries' dtype, lse_nat) of row t over the keys j <= t, each one position behind the one before.

    Under STRING distances are then differences of indices: the keys nearer than the border are a window, those from it
    on a causal triangle, each met by its own rotation of the queries; together the work of one causal attention.
    """
    rows, rope = queries.rows, queries.rope
    if rope is None:
        return attend(queries, (keys,), (RowSegment(rows, start=0, offset=0, end=rows),), kernels)
    assert queries.far is not None
    plain = Keys(keys.k, keys.v)
    near = sliding_window(Queries(queries.near), plain, rope.offset + rope.border_twice, kernels)
    if rope.offset >= rows:
        return near[0].astype(queries.near.dtype), near[1]
    beyond = RowSegment(rows, start=0, offset=-rope.offset, end=rows)
    out, lse = merge_partials([near, attend(Queries(queries.far), (plain,), (beyond,), kernels)])
    return out.astype(queries.near.dtype), lse

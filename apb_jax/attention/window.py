"""Sliding-window attention made of row intervals: a window is a causal triangle and, turned around, another one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, Queries, attend
from apb_jax.attention.inputs import DEFAULT_KERNELS, Kernels
from apb_jax.attention.merge import merge_partials
from pallas_kernels.flash_attention import RowSegment


def sliding_window(
    queries: Queries, keys: Keys, window: int, kernels: Kernels = DEFAULT_KERNELS
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """(out float32, lse_nat) of row t over the keys t - window < j <= t of the same rows; work linear in rows.

    Rows are cut into tiles of ``window``: row i of a tile sees its own tile up to i and the tile before beyond i, which
    is a causal triangle too once rows and keys are reversed.
    """
    rows, batch = queries.rows, queries.near.shape[0]
    if rows <= window:
        return attend(queries, (keys,), (RowSegment(rows, start=0, offset=0, end=rows),), kernels)
    tiles = -(-rows // window)

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, tiles * window - rows), *[(0, 0)] * (a.ndim - 2)))
        return a.reshape(batch, tiles, window, *a.shape[2:])

    def fold(a: Array, flip: bool) -> Array:
        a = a.reshape(-1, *a.shape[2:])
        return jnp.flip(a, axis=1) if flip else a

    q, kv = jax.tree.map(cut, queries), jax.tree.map(cut, keys)
    own = attend(
        jax.tree.map(lambda a: fold(a, False), q),
        (jax.tree.map(lambda a: fold(a, False), kv),),
        (RowSegment(window, start=0, offset=0, end=window),),
        kernels,
    )
    before = attend(
        jax.tree.map(lambda a: fold(a[:, 1:], True), q),
        (jax.tree.map(lambda a: fold(a[:, :-1], True), kv),),
        (RowSegment(window, start=0, offset=-1, end=window),),
        kernels,
    )

    def unfold(part: tuple[Array, Array], flip: bool) -> tuple[Array, Array]:
        out, lse = (jnp.flip(part[0], axis=1), jnp.flip(part[1], axis=2)) if flip else part
        out = out.reshape(batch, -1, *out.shape[2:])
        lse = jnp.moveaxis(lse.reshape(batch, -1, *lse.shape[1:]), 1, 2).reshape(batch, lse.shape[1], -1)
        if flip:  # the first tile has none before it
            out = jnp.pad(out, ((0, 0), (window, 0), (0, 0), (0, 0)))
            lse = jnp.pad(lse, ((0, 0), (0, 0), (window, 0)), constant_values=-jnp.inf)
        return out, lse

    out, lse = merge_partials([unfold(own, False), unfold(before, True)])
    return out[:, :rows], lse[..., :rows]

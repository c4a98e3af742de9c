"""Attention in which a key's distance decides which rotation of the query meets it (STRING, arXiv 2410.18745)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE_ROWS, TILE_KEYS = 256, 1024


@dataclass(frozen=True)
class Interval:
    """The keys that each row sees: ``first <= j < stop``."""

    first: Int[Array, "B S"]
    stop: Int[Array, "B S"]


@dataclass(frozen=True)
class Border:
    """Where the second rotation begins: at distance ``offset``; the key exactly there counts ``twice``, by both."""

    offset: int
    twice: bool = False


def _tiles(x: Array, size: int) -> Array:
    """[B, T, ...] padded with zeros and cut along T: [tiles, B, size, ...]."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def remapped_attention(
    near: Float[Array, "B S H D"],
    far: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B T K"],
    seen: Interval,
    border: Border,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """Rows see the keys of their interval: through ``near`` at distances below the border, else through ``far``.

    Tiled, with the online softmax of a kernel, so memory is linear in length. Returns float32 out and natural
    log-sum-exp; a row that sees nothing gets 0 and -inf.
    """
    batch, rows, heads, dim = near.shape
    kv_heads = k.shape[2]
    group, scale = heads // kv_heads, 1.0 / math.sqrt(dim)
    tile_rows, tile_keys = min(TILE_ROWS, rows), min(TILE_KEYS, k.shape[1])
    precision = "highest" if near.dtype == jnp.float32 else None
    key_tiles = (_tiles(k, tile_keys), _tiles(v, tile_keys), _tiles(k_positions, tile_keys))
    bases = jnp.arange(key_tiles[0].shape[0], dtype=jnp.int32) * tile_keys

    def attend_rows(tile: tuple[Array, ...]) -> tuple[Array, Array]:
        near_q, far_q, place, low, high = tile
        near_q, far_q = (q.reshape(batch, tile_rows, kv_heads, group, dim) for q in (near_q, far_q))

        def step(carry: tuple[Array, ...], keys: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            acc, peak, total = carry
            k_tile, v_tile, k_place, base = keys
            index = base + jnp.arange(tile_keys, dtype=jnp.int32)
            inside = (low[..., None] <= index) & (index < high[..., None])  # [B, S, T]

            def logits(q: Array) -> Array:
                out = jnp.einsum(
                    "bskgd,btkd->bkgst", q, k_tile, preferred_element_type=jnp.float32, precision=precision
                )
                return out * jnp.float32(scale)

            distance = (place[:, None, :, None] - jnp.swapaxes(k_place, 1, 2)[:, :, None, :])[:, :, None]
            close, distant = logits(near_q), logits(far_q)
            score = jnp.where(distance < border.offset, close, distant)
            if border.twice:
                score = jnp.where(distance == border.offset, jnp.logaddexp(close, distant), score)
            score = jnp.where(inside[:, None, None], score, -jnp.inf)
            new_peak = jnp.maximum(peak, score.max(axis=-1))
            shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
            weights, decay = jnp.exp(score - shift[..., None]), jnp.exp(peak - shift)
            read = inside.any(axis=1)[:, :, None, None]  # unread slots may hold NaN, and 0 * NaN is NaN
            values = jnp.where(read, v_tile, jnp.zeros_like(v_tile)).astype(jnp.float32)
            update = jnp.einsum("bkgst,btkd->bkgsd", weights, values, precision=precision)
            return (acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)), None

        shape = (batch, kv_heads, group, tile_rows)
        start: Any = (jnp.zeros((*shape, dim), jnp.float32), jnp.full(shape, -jnp.inf), jnp.zeros(shape))
        (acc, peak, total), _ = jax.lax.scan(step, start, (*key_tiles, bases))
        safe = jnp.where(total != 0, total, 1.0)
        return acc / safe[..., None], jnp.where(total != 0, peak + jnp.log(safe), -jnp.inf)

    by_row = (near, far, q_positions, seen.first, seen.stop)
    out, lse = jax.lax.map(attend_rows, tuple(_tiles(a, tile_rows) for a in by_row))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)[:, :rows]
    return out, lse.transpose(1, 2, 3, 0, 4).reshape(batch, heads, -1)[:, :, :rows]

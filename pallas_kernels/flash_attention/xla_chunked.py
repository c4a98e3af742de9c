"""Attention in tiles through XLA: any device, differentiable, memory linear in length (forward and backward)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import vary_over, varying_axes
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import row_bounds

TILE_ROWS = 256
TILE_KEYS = 1024


def _tiled(array: jax.Array, tile: int) -> jax.Array:
    """[B, N, ...] -> [number of tiles, B, tile, ...], padded with zeros at the end."""
    batch, length = array.shape[:2]
    count = -(-length // tile)
    padding = [(0, 0), (0, count * tile - length)] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, padding).reshape(batch, count, tile, *array.shape[2:])
    return jnp.moveaxis(padded, 1, 0)


def _attend_tile(carry, tile, q, first, stop, scale):
    """One step of the online softmax; carry = (accumulator [B,K,G,q,D], peak, total), all float32."""
    k, v, base = tile
    precision = "highest" if q.dtype == jnp.float32 else None
    key = base + jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = (first[..., None] <= key) & (key < stop[..., None])  # [B, q, t]

    def attend(carry):
        acc, peak, total = carry
        # Slots that no row sees may hold NaN, and 0 * NaN is NaN.
        read = visible.any(axis=1)[:, :, None, None]
        k_read, v_read = jnp.where(read, k, jnp.zeros_like(k)), jnp.where(read, v, jnp.zeros_like(v))
        scores = jnp.einsum("bskgd,btkd->bkgst", q, k_read, preferred_element_type=jnp.float32, precision=precision)
        scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
        new_peak = lax.stop_gradient(jnp.maximum(peak, scores.max(axis=-1)))
        shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(peak - shift)
        update = jnp.einsum(
            "bkgst,btkd->bkgsd",
            weights.astype(v.dtype),
            v_read,
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        return acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)

    return lax.cond(visible.any(), attend, lambda carry: carry, carry), None


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, stop: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Row s of batch b of q [B, S, H, D] sees keys ``first[b, s] <= j < stop[b, s]`` of k, v [B, T, K, D].

    Returns float32 out [B, S, H, D] and natural log-sum-exp [B, H, S].
    """
    batch, rows, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    tile_rows, tile_keys = min(TILE_ROWS, rows), min(TILE_KEYS, keys)
    key_tiles = (_tiled(k, tile_keys), _tiled(v, tile_keys))
    bases = jnp.arange(key_tiles[0].shape[0], dtype=jnp.int32) * tile_keys
    axes = varying_axes(q, k, v, first, stop)
    tiles = (*key_tiles, vary_over(axes, bases))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_rows(row_tile):
        q_tile, first_tile, stop_tile = row_tile
        q_tile = q_tile.reshape(batch, tile_rows, kv_heads, group, dim)
        shape = (batch, kv_heads, group, tile_rows)
        start = vary_over(
            axes,
            (
                jnp.zeros((*shape, dim), jnp.float32),
                jnp.full(shape, -jnp.inf, jnp.float32),
                jnp.zeros(shape, jnp.float32),
            ),
        )
        step = functools.partial(_attend_tile, q=q_tile, first=first_tile, stop=stop_tile, scale=scale)
        (acc, peak, total), _ = lax.scan(step, start, tiles)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[..., None], acc / safe[..., None], 0.0)
        return out, jnp.where(seen, peak + jnp.log(safe), -jnp.inf)

    row_tiles = (_tiled(q, tile_rows), _tiled(first, tile_rows), _tiled(stop, tile_rows))
    out, lse = lax.map(attend_rows, row_tiles)
    # [tiles, B, K, G, q(, D)] -> [B, S, H, D] and [B, H, S]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)[:, :rows]
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(batch, heads, -1)[:, :, :rows]
    return out, lse


def xla_chunked(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    k, v = jnp.concatenate(call.k, axis=1), jnp.concatenate(call.v, axis=1)
    first, stop = row_bounds(call.rows, call.batch, call.keys)
    axes = varying_axes(call.q)
    first, stop = vary_over(axes, (first, stop))
    out, lse = chunked_attention(call.q, k, v, first, stop, call.scale)
    return out.astype(call.q.dtype), lse

"""Attention in tiles through XLA: any device, differentiable, memory linear in length (forward and backward)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import vary_over, varying_axes
from pallas_kernels.device import Device
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.eight_bit import quantise_call, round_probabilities, shifted
from pallas_kernels.flash_attention.rows import row_bounds

TILE_ROWS = 256
TILE_KEYS = 512


def _tiled(array: jax.Array, tile: int) -> jax.Array:
    """[B, N, ...] -> [number of tiles, B, tile, ...], padded with zeros at the end."""
    batch, length = array.shape[:2]
    count = -(-length // tile)
    padding = [(0, 0), (0, count * tile - length)] + [(0, 0)] * (array.ndim - 2)
    padded = jnp.pad(array, padding).reshape(batch, count, tile, *array.shape[2:])
    return jnp.moveaxis(padded, 1, 0)


def _attend_tile(carry, tile, q, first, stop, scale, rounded):
    """One step of the online softmax; carry = (accumulator [B,K,G*q,D], peak, total), all float32; q [B,K,G*q,D]."""
    k, v, base = tile  # [B, K, t, D]
    precision = "highest" if q.dtype == jnp.float32 else None
    key = base + jnp.arange(k.shape[2], dtype=jnp.int32)
    visible = (first[..., None] <= key) & (key < stop[..., None])  # [B, q, t]
    grouped = (*q.shape[:2], -1, visible.shape[1], k.shape[2])

    def attend(carry):
        acc, peak, total = carry
        # Slots that no row sees may hold NaN, and 0 * NaN is NaN.
        read = visible.any(axis=1)[:, None, :, None]
        k_read, v_read = jnp.where(read, k, jnp.zeros_like(k)), jnp.where(read, v, jnp.zeros_like(v))
        scores = jnp.einsum("bksd,bktd->bkst", q, k_read, preferred_element_type=jnp.float32, precision=precision)
        masked = jnp.where(visible[:, None, None], scores.reshape(grouped) * scale, -jnp.inf)
        scores = masked.reshape(scores.shape)
        new_peak = lax.stop_gradient(jnp.maximum(peak, scores.max(axis=-1)))
        shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(peak - shift)
        update = jnp.einsum(
            "bkst,bktd->bksd",
            rounded(weights).astype(v.dtype),
            v_read,
            preferred_element_type=jnp.float32,
            precision=precision,
        )
        return acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)

    return lax.cond(visible.any(), attend, lambda carry: carry, carry), None


def chunked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, stop: jax.Array, scale: float,
    rounded: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Row s of batch b of q [B, S, H, D] sees keys ``first[b, s] <= j < stop[b, s]`` of k, v [B, T, K, D].

    ``rounded``: what the second product makes of the probabilities, 0 to 1. Returns float32 out [B, S, H, D] and
    natural log-sum-exp [B, H, S].
    """
    batch, rows, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    tile_rows, tile_keys = min(TILE_ROWS, rows), min(TILE_KEYS, keys)
    # Heads in front of rows, once: batched products of plain matrices, nothing is transposed inside the loops.
    key_tiles = tuple(jnp.swapaxes(_tiled(x, tile_keys), 2, 3) for x in (k, v))
    bases = jnp.arange(key_tiles[0].shape[0], dtype=jnp.int32) * tile_keys
    axes = varying_axes(q, k, v, first, stop)
    tiles = (*key_tiles, vary_over(axes, bases))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_rows(row_tile):
        q_tile, first_tile, stop_tile = row_tile
        q_tile = jnp.moveaxis(q_tile.reshape(batch, tile_rows, kv_heads, group, dim), 1, 3)
        q_tile = q_tile.reshape(batch, kv_heads, group * tile_rows, dim)
        shape = q_tile.shape[:3]
        start = vary_over(
            axes,
            (
                jnp.zeros(q_tile.shape, jnp.float32),
                jnp.full(shape, -jnp.inf, jnp.float32),
                jnp.zeros(shape, jnp.float32),
            ),
        )
        step = functools.partial(_attend_tile, q=q_tile, first=first_tile, stop=stop_tile, scale=scale, rounded=rounded)
        (acc, peak, total), _ = lax.scan(step, start, tiles)
        seen = total != 0  # true for NaN, which must not pass for a row that saw nothing
        safe = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[..., None], acc / safe[..., None], 0.0)
        return out, jnp.where(seen, peak + jnp.log(safe), -jnp.inf)

    row_tiles = (_tiled(q, tile_rows), _tiled(first, tile_rows), _tiled(stop, tile_rows))
    out, lse = lax.map(attend_rows, row_tiles)
    # [tiles, B, K, G*q(, D)] -> [B, S, H, D] and [B, H, S]
    count = out.shape[0]
    out = out.reshape(count, batch, heads, tile_rows, dim).transpose(1, 0, 3, 2, 4)
    lse = lse.reshape(count, batch, heads, tile_rows).transpose(1, 2, 0, 3)
    return out.reshape(batch, -1, heads, dim)[:, :rows], lse.reshape(batch, heads, -1)[:, :, :rows]


def refuse_emulation(call: AttentionCall, device: Device) -> str | None:
    """Why XLA should not serve the call on the device, or None if it may: 8-bit products only for CPUs."""
    if call.eight is not None and device.platform == "gpu":
        return "only emulates 8-bit products, slower than 16-bit ones"
    return None


def xla_chunked(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; 8-bit products are emulated in float32."""
    q, k, v, scale = call.q, jnp.concatenate(call.k, axis=1), jnp.concatenate(call.v, axis=1), call.scale
    first, stop = row_bounds(call.rows, call.batch, call.keys)
    first, stop = vary_over(varying_axes(q), (first, stop))
    if call.eight is None:
        out, lse = chunked_attention(q, k, v, first, stop, scale)
        return out.astype(q.dtype), lse
    found = quantise_call(q, call.k, call.v, call.rows, scale, call.eight)
    # A positive factor of a query row is exact in its scores; every product of two e4m3 numbers is exact in float32.
    wide = found.q.astype(jnp.float32) * found.row_scale.transpose(0, 2, 1)[..., None]
    keys, values = (jnp.concatenate(ranges, axis=1).astype(jnp.float32) for ranges in (found.k, found.v))
    if found.value_scale is None:
        out, lse = chunked_attention(wide, keys, values, first, stop, 1.0)
    else:
        out, lse = chunked_attention(wide, keys, values, first, stop, 1.0, round_probabilities)
        out = out * found.value_scale[:, None, :, None]
    return out.astype(q.dtype), shifted(lse, found.shift)

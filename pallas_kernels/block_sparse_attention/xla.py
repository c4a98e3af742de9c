"""Block-sparse attention through XLA: one gathered window at a time, memory linear in length."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.call import BlockSparseCall
from pallas_kernels.compat import vary_over, varying_axes


def _update(carry, q, k, v, visible, scale):
    """One step of the online softmax for one head: q [rows, D], k and v [n, D], visible [rows, n]."""
    acc, peak, total = carry
    precision = "highest" if q.dtype == jnp.float32 else None
    read = visible.any(axis=0)[:, None]  # unread slots may hold NaN, and 0 * NaN is NaN
    k, v = jnp.where(read, k, jnp.zeros_like(k)), jnp.where(read, v, jnp.zeros_like(v))
    scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32, precision=precision)
    scores = jnp.where(visible, scores * scale, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
    weights, decay = jnp.exp(scores - shift[:, None]), jnp.exp(peak - shift)
    update = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision)
    return acc * decay[:, None] + update, new_peak, total * decay + weights.sum(axis=-1)


def _one_head_tile(q, row, k, v, starts, count, columns, column_count, *, block_k, scale, axes):
    """q [block_q, D] whose rows see keys up to ``row`` [block_q]; k and v [T, D] of its KV head."""
    keys, dim = k.shape
    begin = (
        jnp.zeros((q.shape[0], dim), jnp.float32),
        jnp.full((q.shape[0],), -jnp.inf, jnp.float32),
        jnp.zeros((q.shape[0],), jnp.float32),
    )
    carry = vary_over(axes, begin)

    def attend(carry, key, valid):
        at = jnp.clip(key, 0, keys - 1)
        visible = valid & (key >= 0) & (key < keys) & (key <= row[:, None])
        return _update(carry, q, k[at], v[at], visible, scale)

    def window(i, carry):
        return attend(carry, starts[i] + jnp.arange(block_k, dtype=jnp.int32), True)

    carry = lax.fori_loop(0, count, window, carry)
    if columns is not None:

        def lines(i, carry):
            place = i * block_k + jnp.arange(block_k, dtype=jnp.int32)
            return attend(carry, columns[jnp.minimum(place, columns.shape[0] - 1)], place < column_count)

        carry = lax.fori_loop(0, (column_count + block_k - 1) // block_k, lines, carry)
    acc, peak, total = carry
    safe = jnp.where(total > 0, total, 1.0)
    return acc / safe[:, None], jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)


def xla(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    batch, rows, heads, dim = call.q.shape
    group = heads // call.k.shape[2]
    tiles, block_q = call.tiles, call.block_q
    count = -(-rows // block_q)
    q = jnp.pad(call.q, ((0, 0), (0, count * block_q - rows), (0, 0), (0, 0)))
    q = q.reshape(batch, count, block_q, heads, dim)
    row = jnp.arange(count * block_q, dtype=jnp.int32).reshape(count, block_q)
    axes = varying_axes(call.q)
    attend = functools.partial(_one_head_tile, block_k=call.block_k, scale=call.scale, axes=axes)

    def one(place):
        b, tile, h = place
        pick = lambda array: None if array is None else array[b, h, tile]  # noqa: E731
        return attend(
            q[b, tile, :, h],
            row[tile] + call.causal_offset[b],
            call.k[b, :, h // group],
            call.v[b, :, h // group],
            *(pick(a) for a in (tiles.starts, tiles.counts, tiles.columns, tiles.column_counts)),
        )

    places = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in (batch, count, heads)), indexing="ij")
    out, lse = lax.map(one, vary_over(axes, tuple(p.reshape(-1) for p in places)))
    out = out.reshape(batch, count, heads, block_q, dim).transpose(0, 1, 3, 2, 4)
    lse = lse.reshape(batch, count, heads, block_q).transpose(0, 2, 1, 3)
    out = out.reshape(batch, count * block_q, heads, dim)[:, :rows].astype(call.q.dtype)
    return out, lse.reshape(batch, heads, count * block_q)[:, :, :rows]

"""Block-sparse attention through XLA: many query tiles at a time, each against its own gathered windows.

Work follows the windows that exist; memory is linear in length. A step gathers about ``STEP_KEYS`` keys for each of
``TILES`` query tiles of neighbouring places, which have similar numbers of windows, and multiplies them as one batch.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.call import BlockSparseCall
from pallas_kernels.compat import vary_over, varying_axes

STEP_KEYS = 512
TILES, TILES_CPU = 128, 4
"""Query tiles of one head in flight: enough to fill a GPU; on a CPU few, so that they stay in its caches."""


def _update(carry, q, k, v, visible, scale):
    """One step of the online softmax: q [P, rows, D], k and v [P, n, D], visible [P, rows, n]."""
    acc, peak, total = carry
    precision = "highest" if q.dtype == jnp.float32 else None
    read = visible.any(axis=1)[..., None]  # unread slots may hold NaN, and 0 * NaN is NaN
    k, v = jnp.where(read, k, jnp.zeros_like(k)), jnp.where(read, v, jnp.zeros_like(v))
    scores = jnp.einsum("pqd,pnd->pqn", q, k, preferred_element_type=jnp.float32, precision=precision)
    scores = jnp.where(visible, scores * scale, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    shift = jnp.where(jnp.isneginf(new_peak), 0.0, new_peak)
    weights, decay = jnp.exp(scores - shift[..., None]), jnp.exp(peak - shift)
    update = jnp.einsum(
        "pqn,pnd->pqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision
    )
    return acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)


def _windows(array, head, first, size):
    """``size`` rows of array [BK, T, D] from each of ``first`` [P, W] on, in slice ``head`` [P]: [P, W * size, D]."""

    def one(head, start):
        return lax.dynamic_slice(array, (head, start, 0), (1, size, array.shape[2]))[0]

    found = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(head, first)
    return found.reshape(first.shape[0], -1, array.shape[2])


@dataclass(frozen=True)
class Flat:
    """k and v [BK, T, D] of all sequences and KV heads; ``keys`` of T exist."""

    k: jax.Array
    v: jax.Array
    keys: int


def _attend(q, row, head, tiles, source, block_k, scale):
    """q [P, rows, D] whose rows see keys up to ``row`` [P, rows] of slice ``head`` [P] of ``source``.

    ``tiles``: (starts [P, R], counts [P], columns [P, C] or None, column counts [P] or None).
    """
    k, v, keys = source.k, source.v, source.keys
    starts, counts, columns, column_counts = tiles
    per_step = max(1, STEP_KEYS // block_k)
    shape = q.shape[:2]
    begin = (
        jnp.zeros(q.shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    )  # fmt: skip
    carry = vary_over(varying_axes(q), begin)

    def take(table, first, width):
        """Entries first..first + width - 1 of every row of ``table``; past its end the last one again."""
        place = first + jnp.arange(width, dtype=jnp.int32)
        return place, table[:, jnp.minimum(place, table.shape[1] - 1)]

    def windows(i, carry):
        place, start = take(starts, i * per_step, per_step)
        # A slice must lie inside the array: move it there, and leave out what the move brought in.
        inside = jnp.clip(start, 0, k.shape[1] - block_k)
        key = inside[..., None] + jnp.arange(block_k, dtype=jnp.int32)
        wanted = (key >= start[..., None]) & (key < start[..., None] + block_k) & (key < keys)
        wanted &= (place < counts[:, None])[..., None]
        key, wanted = (a.reshape(a.shape[0], 1, -1) for a in (key, wanted))
        k_read, v_read = (_windows(array, head, inside, block_k) for array in (k, v))
        return _update(carry, q, k_read, v_read, wanted & (key <= row[..., None]), scale)

    carry = lax.fori_loop(0, (counts.max() + per_step - 1) // per_step, windows, carry)
    if columns is not None:

        def lines(i, carry):
            place, key = take(columns, i * STEP_KEYS, STEP_KEYS)
            wanted = (place < column_counts[:, None]) & (key >= 0) & (key < keys)
            at = jnp.clip(key, 0, keys - 1)
            visible = wanted[:, None] & (key[:, None] <= row[..., None])
            return _update(carry, q, k[head[:, None], at], v[head[:, None], at], visible, scale)

        carry = lax.fori_loop(0, (column_counts.max() + STEP_KEYS - 1) // STEP_KEYS, lines, carry)
    acc, peak, total = carry
    safe = jnp.where(total != 0, total, 1.0)
    return acc / safe[..., None], jnp.where(total != 0, peak + jnp.log(safe), -jnp.inf)


def xla(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    batch, rows, heads, dim = call.q.shape
    keys, kv_heads = call.k.shape[1:3]
    block_q, block_k, tiles = call.blocks.q, call.blocks.k, call.tiles
    count = -(-rows // block_q)
    together = min(TILES_CPU if jax.default_backend() == "cpu" else TILES, count)
    axes = varying_axes(call.q)

    def flat(array, room):
        """[B, T, K, D] -> [B * K, T or more, D]."""
        padded = jnp.pad(array, ((0, 0), (0, room - array.shape[1]), (0, 0), (0, 0)))
        return jnp.swapaxes(padded, 1, 2).reshape(-1, room, dim)

    room = max(keys, block_k)
    source = Flat(flat(call.k, room), flat(call.v, room), keys)
    q = flat(call.q, count * block_q).reshape(batch * heads, count, block_q, dim)
    row = jnp.arange(count * block_q, dtype=jnp.int32).reshape(count, block_q)
    attend = functools.partial(_attend, source=source, block_k=block_k, scale=call.scale)

    def one(place):
        """A group of neighbouring tiles of one head."""
        sequence, head, first = place
        tile = jnp.minimum(first + jnp.arange(together, dtype=jnp.int32), count - 1)
        kv_head = jnp.full((together,), sequence * kv_heads + head // (heads // kv_heads), jnp.int32)
        pick = lambda array: None if array is None else array[sequence, head, tile]  # noqa: E731
        return attend(
            q[sequence * heads + head, tile],
            row[tile] + call.causal_offset[sequence],
            kv_head,
            tuple(pick(array) for array in (tiles.starts, tiles.counts, tiles.columns, tiles.column_counts)),
        )

    groups = -(-count // together)
    places = jnp.meshgrid(
        *(jnp.arange(n, dtype=jnp.int32) for n in (batch, heads)),
        jnp.arange(groups, dtype=jnp.int32) * together,
        indexing="ij",
    )
    out, lse = lax.map(one, vary_over(axes, tuple(place.reshape(-1) for place in places)))
    room = groups * together * block_q
    out = out.reshape(batch, heads, room, dim)[:, :, :rows].swapaxes(1, 2).astype(call.q.dtype)
    return out, lse.reshape(batch, heads, room)[:, :, :rows]

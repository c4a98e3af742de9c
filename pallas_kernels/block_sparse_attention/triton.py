"""Block-sparse attention on NVIDIA GPUs in Pallas Triton: windows at any start and single columns.

One program for one query tile of one head, as in MInference's own kernel (arXiv 2407.02490): a loop over windows that
all rows see entirely, one over the windows that need a mask, one over gathered columns; an online softmax through all.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.call import BlockSparseCall
from pallas_kernels.compat import array_type
from pallas_kernels.device import Device, refuse_before_ampere

STEP_KEYS = 64
LOG2_E = math.log2(math.e)
MOST_ELEMENTS = 2**31  # offsets are 32 bits wide


def refuse(call: BlockSparseCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_before_ampere(device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (16, 32, 64, 128):
        return f"takes head dimension 16, 32, 64 or 128, q has {dim}"
    if call.block_q not in (16, 32, 64, 128) or call.block_k not in (16, 32, 64, 128):
        return f"takes tiles of 16, 32, 64 or 128 rows and keys, not {call.block_q} and {call.block_k}"
    if (most := _elements_per_kv_head(call)) >= MOST_ELEMENTS:
        return f"takes less than 2^31 elements a KV head, one array has {most}"
    return None


def _elements_per_kv_head(call: BlockSparseCall) -> int:
    """Of the largest array."""
    arrays = (call.q, call.k, *jax.tree.leaves(call.tiles))
    return max(array.size for array in arrays) // call.k.shape[2]


def _of_kv_heads(call: BlockSparseCall, first: int, count: int) -> BlockSparseCall:
    """The call for ``count`` KV heads from ``first`` on and the query heads that use them."""
    group = call.q.shape[2] // call.k.shape[2]
    mine, heads = slice(first, first + count), slice(first * group, (first + count) * group)
    k, v = call.k[:, :, mine], call.v[:, :, mine]
    tiles = jax.tree.map(lambda a: a[:, heads], call.tiles)
    return dataclasses.replace(call, q=call.q[:, :, heads], k=k, v=v, tiles=tiles)


def _kernel(starts, counts, full, columns, column_counts, offsets, q_ref, k_ref, v_ref, out_ref, lse_ref, *, call):
    tiles, step_keys = counts.shape[2], min(STEP_KEYS, call.block_k)
    tile, head, batch = tiles - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)  # the longest first
    kv_head = head // (call.q.shape[2] // call.k.shape[2])
    rows, keys, dim = call.q.shape[1], call.k.shape[1], call.q.shape[3]
    every = pl.ds(0, dim)
    row = tile * call.block_q + jnp.arange(call.block_q, dtype=jnp.int32)
    exists = row < rows
    q = plt.load(q_ref.at[batch, row, head, every], mask=exists[:, None], other=0.0)
    last_key = row + plt.load(offsets.at[batch])

    def attend(key, wanted, carry, masked):
        """Keys at ``key``; those not ``wanted`` are neither read nor seen."""
        acc, peak, total = carry
        if masked:  # unread slots may hold NaN; as zeros they cannot pass it on
            k, v = (plt.load(a.at[batch, key, kv_head, every], mask=wanted[:, None], other=0.0) for a in (k_ref, v_ref))
        else:
            k, v = (plt.load(a.at[batch, key, kv_head, every]) for a in (k_ref, v_ref))
        scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * (call.scale * LOG2_E)
        if masked:
            scores = jnp.where(wanted[None, :] & (key[None, :] <= last_key[:, None]), scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        p, decay = jnp.exp2(scores - shift[:, None]), jnp.exp2(peak - shift)
        update = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return acc * decay[:, None] + update, new_peak, total * decay + jnp.sum(p, axis=1)

    def window(number, carry, masked):
        start = plt.load(starts.at[batch, head, tile, number])
        for first in range(0, call.block_k, step_keys):
            key = start + first + jnp.arange(step_keys, dtype=jnp.int32)
            carry = attend(key, (key >= 0) & (key < keys), carry, masked)
        return carry

    carry = (
        jnp.zeros((call.block_q, dim), jnp.float32),
        jnp.full((call.block_q,), -jnp.inf, jnp.float32),
        jnp.zeros((call.block_q,), jnp.float32),
    )
    entire = plt.load(full.at[batch, head, tile])
    carry = lax.fori_loop(0, entire, functools.partial(window, masked=False), carry)
    count = plt.load(counts.at[batch, head, tile])
    carry = lax.fori_loop(entire, count, functools.partial(window, masked=True), carry)
    if columns is not None:
        used = plt.load(column_counts.at[batch, head, tile])

        def lines(step, carry):
            place = step * STEP_KEYS + jnp.arange(STEP_KEYS, dtype=jnp.int32)
            key = plt.load(columns.at[batch, head, tile, place], mask=place < used, other=-1)
            return attend(key, (key >= 0) & (key < keys), carry, True)

        carry = lax.fori_loop(0, lax.div(used + STEP_KEYS - 1, jnp.int32(STEP_KEYS)), lines, carry)
    acc, peak, total = carry
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[:, None], acc / safe[:, None], 0.0).astype(out_ref.dtype)
    plt.store(out_ref.at[batch, row, head, every], out, mask=exists[:, None])
    plt.store(lse_ref.at[batch, head, row], jnp.where(seen, (peak + jnp.log2(safe)) / LOG2_E, -jnp.inf), mask=exists)


def entire_windows(call: BlockSparseCall) -> jax.Array:
    """int32 [B, H, n_q]: how many windows, from the first on, lie inside the cache and before every row of the tile."""
    starts, counts = call.tiles.starts, call.tiles.counts
    first_row = jnp.arange(counts.shape[2], dtype=jnp.int32) * call.block_q
    stop = jnp.minimum(first_row + call.causal_offset[:, None] + 1, call.k.shape[1])[:, None, :, None]
    number = jnp.arange(starts.shape[-1], dtype=jnp.int32)
    other = (starts < 0) | (starts + call.block_k > stop) | (number >= counts[..., None])
    return jnp.min(jnp.where(other, number, starts.shape[-1]), axis=-1, initial=starts.shape[-1])


def triton(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; some KV heads at a time where all are too many."""
    heads = call.k.shape[2]
    count = (MOST_ELEMENTS - 1) // _elements_per_kv_head(call)
    if count >= heads:
        return _launch(call)
    parts = [_launch(_of_kv_heads(call, first, min(count, heads - first))) for first in range(0, heads, count)]
    return jnp.concatenate([out for out, _ in parts], axis=2), jnp.concatenate([lse for _, lse in parts], axis=1)


def _launch(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, dim = call.q.shape
    tiles = call.tiles
    lines = () if tiles.columns is None else (tiles.columns, tiles.column_counts)

    def kernel(starts, counts, full, *refs):
        columns = refs[: len(lines)] or (None, None)
        _kernel(starts, counts, full, *columns, *refs[len(lines) :], call=call)

    large = call.block_q * dim > 64 * 128
    return pl.pallas_call(
        kernel,
        out_shape=(
            array_type(call.q.shape, call.q.dtype, call.q),
            array_type((batch, heads, rows), jnp.float32, call.q),
        ),
        grid=(tiles.counts.shape[2], heads, batch),
        compiler_params=plt.CompilerParams(num_warps=8 if large else 4, num_stages=2),
        name="block_sparse_attention",
    )(tiles.starts, tiles.counts, entire_windows(call), *lines, call.causal_offset, call.q, call.k, call.v)

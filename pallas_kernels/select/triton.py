"""Selection on any NVIDIA GPU in Pallas Triton: threshold, ranks and gather without a sort.

First kernel, one program per KV head: all scores in registers, the count-th largest found bit by bit, then
the chosen rows compacted in index order (a running count puts the lowest indices first among equals).
Second kernel, many programs: a chosen row's place is the number of better ones; its K and V go there.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compat import array_type
from pallas_kernels.device import Device
from pallas_kernels.select.call import SelectCall

MOST_ROWS = 32768  # one program holds them all in registers, and two 16-bit counts share a word
PLACE_ROWS = 64  # rows that a program of the second kernel places
PLACE_CHUNK = 1024  # rows that it compares them with at once
LOWEST = np.int32(-(2**31))


def refuse(call: SelectCall, device: Device) -> str | None:
    """Why the kernels cannot serve the call on the device, or None if they can."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU, the default device is {device.name}"
    if call.scores.dtype != jnp.float32:
        return f"takes float32 scores, not {call.scores.dtype}"
    if (rows := call.scores.shape[1]) > MOST_ROWS:
        return f"takes up to {MOST_ROWS} rows, there are {rows}"
    if (dim := call.k.shape[-1]) & (dim - 1):
        return f"takes head dimensions that are powers of two, not {dim}"
    return None


def _ordered(scores):
    """float32 -> int32 with the same order; -0.0 and 0.0 become equal."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _choose_rows(scores_ref, order_ref, index_ref, *, rows, count, width):
    batch, head = pl.program_id(0), pl.program_id(1)
    row = jnp.arange(width, dtype=jnp.int32)
    scores = plt.load(scores_ref.at[batch, row, head], mask=row < rows, other=-jnp.inf)
    order = jnp.where(row < rows, _ordered(scores), LOWEST)

    def add_bit(step, threshold):
        """The largest threshold that at least ``count`` rows reach, bits from the top, as an unsigned number."""
        candidate = threshold | jnp.left_shift(jnp.int32(1), 31 - step)
        reached = jnp.sum((order >= (candidate ^ LOWEST)).astype(jnp.int32))
        return jnp.where(reached >= count, candidate, threshold)

    threshold = lax.fori_loop(0, 32, add_bit, jnp.int32(0)) ^ LOWEST
    above, equal = order > threshold, order == threshold
    missing = count - jnp.sum(above.astype(jnp.int32))
    running = jnp.cumsum(above.astype(jnp.int32) | jnp.left_shift(equal.astype(jnp.int32), 16))
    above_before, equal_before = running & 0xFFFF, lax.shift_right_logical(running, jnp.int32(16))
    chosen = above | (equal & (equal_before <= missing))
    place = above_before + jnp.minimum(equal_before, missing) - 1
    plt.store(order_ref.at[batch, head, place], order, mask=chosen)
    plt.store(index_ref.at[batch, head, place], row, mask=chosen)


def _place_rows(order_ref, index_ref, k_ref, v_ref, out_index_ref, k_out_ref, v_out_ref, *, count, dim):
    batch, head = pl.program_id(0), pl.program_id(1)
    mine = pl.program_id(2) * PLACE_ROWS + jnp.arange(PLACE_ROWS, dtype=jnp.int32)
    exists = mine < count
    order = plt.load(order_ref.at[batch, head, mine], mask=exists, other=LOWEST)
    index = plt.load(index_ref.at[batch, head, mine], mask=exists, other=0)

    def count_better(block, rank):
        others = block * PLACE_CHUNK + jnp.arange(PLACE_CHUNK, dtype=jnp.int32)
        there = others < count
        other = plt.load(order_ref.at[batch, head, others], mask=there, other=LOWEST)
        # Rows are stored in index order: among equals the earlier one is better.
        earlier = (others[None, :] < mine[:, None]) & (other[None, :] == order[:, None])
        better = ((other[None, :] > order[:, None]) | earlier) & there[None, :]
        return rank + jnp.sum(better.astype(jnp.int32), axis=1)

    blocks = -(-count // PLACE_CHUNK)
    rank = lax.fori_loop(0, blocks, count_better, jnp.zeros((PLACE_ROWS,), jnp.int32))
    plt.store(out_index_ref.at[batch, rank, head], index, mask=exists)
    every = pl.ds(0, dim)
    for source, target in ((k_ref, k_out_ref), (v_ref, v_out_ref)):
        rows = plt.load(source.at[batch, index, head, every], mask=exists[:, None], other=0.0)
        plt.store(target.at[batch, rank, head, every], rows, mask=exists[:, None])


def triton(call: SelectCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """index [B, count, K], k_sel and v_sel [B, count, K, D]."""
    batch, rows, heads = call.scores.shape
    count, dim = call.count, call.k.shape[-1]
    chosen = array_type((batch, heads, count), jnp.int32, call.scores)
    order, index = pl.pallas_call(
        functools.partial(_choose_rows, rows=rows, count=count, width=pl.next_power_of_2(rows)),
        out_shape=(chosen, chosen),
        grid=(batch, heads),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="select_choose_rows",
    )(call.scores)
    kept = array_type((batch, count, heads, dim), call.k.dtype, call.k)
    return pl.pallas_call(
        functools.partial(_place_rows, count=count, dim=dim),
        out_shape=(array_type((batch, count, heads), jnp.int32, call.scores), kept, kept),
        grid=(batch, heads, -(-count // PLACE_ROWS)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="select_place_rows",
    )(order, index, call.k, call.v)

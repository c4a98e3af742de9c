"""What a GPU kernel has to do, computed on the device from the run-time bounds: one table row a block of rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import per_batch, static

BLOCK_ROWS = 128
# Columns of the work table: first key of all rows, end of the first row's keys by causality, end of all rows'
# keys, end of the keys that some row sees, first row; then four for each range (see `mosaic_gpu._Range`).
START, FIRST_STOP, END, LAST_STOP, ROW = range(5)
RANGE_COLUMNS = 5
KEY_ALIGNMENT = 8  # the copy engine reads whole shared-memory tiles, 8 rows high


def padded_rows(rows: int) -> int:
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def block_order(call: AttentionCall) -> list[tuple[int, int, int]]:
    """(segment, first row in the segment, first padded row) of each block of rows, heaviest first.

    Weight is the number of keys up to the last visible one, where bounds are known while tracing.
    """
    blocks, padded = [], 0
    for number, segment in enumerate(call.rows):
        offset, end = static(segment.offset), static(segment.end)
        for row in range(0, segment.rows, BLOCK_ROWS):
            reach = (0 if offset is None else offset) + row + BLOCK_ROWS
            weight = min(reach, call.keys if end is None else end)
            blocks.append((-weight, number, row, padded + row))
        padded += padded_rows(segment.rows)
    return [block[1:] for block in sorted(blocks)]


def work_table(call: AttentionCall, block_keys: int, alignment: int = KEY_ALIGNMENT) -> jax.Array:
    """int32 [B, blocks of rows, columns]: what each block of threads has to do, from the run-time bounds.

    Tiles begin at multiples of ``alignment`` keys.
    """
    order = block_order(call)
    number = np.array([block[0] for block in order])
    row = np.array([block[1] for block in order], np.int32)
    last = np.minimum(row + BLOCK_ROWS, np.array([call.rows[n].rows for n in number], np.int32))

    def column(name: str) -> jax.Array:
        bounds = jnp.stack([per_batch(getattr(segment, name), call.batch) for segment in call.rows], axis=1)
        return bounds[:, number]

    start, offset = jnp.maximum(column("start"), 0), column("offset")
    end = jnp.minimum(column("end"), call.keys)
    first_stop = offset + row + 1
    last_stop = jnp.minimum(end, offset + last)
    all_see = jnp.minimum(first_stop, end)
    padded_row = jnp.broadcast_to(np.array([block[2] for block in order], np.int32), end.shape)
    columns = [start, first_stop, end, last_stop, padded_row]
    base = 0
    for key in call.k:
        length = key.shape[1]
        begin, stop, full_stop = (jnp.clip(x - base, 0, length) for x in (start, last_stop, all_see))
        first = begin // alignment * alignment
        tiles = jnp.where(stop > begin, (stop - first + block_keys - 1) // block_keys, 0)
        head = jnp.where((tiles > 0) & (begin > first), 1, 0)
        full = jnp.clip((full_stop - first) // block_keys - head, 0, jnp.maximum(tiles - head, 0))
        columns += [first, head, full, tiles]
        base += length
    return jnp.stack(columns, axis=-1).astype(jnp.int32)


def pad_segments(array, rows, axis=1):
    """The array with each segment's rows (on ``axis``) padded to whole blocks; itself where nothing is missing."""
    if all(segment.rows % BLOCK_ROWS == 0 for segment in rows):
        return array
    parts, row = [], 0
    for segment in rows:
        part = lax.slice_in_dim(array, row, row + segment.rows, axis=axis)
        missing = padded_rows(segment.rows) - segment.rows
        parts.append(jnp.pad(part, [(0, missing if dimension == axis else 0) for dimension in range(array.ndim)]))
        row += segment.rows
    return jnp.concatenate(parts, axis=axis)


def unpad_segments(array, rows, axis):
    if all(segment.rows % BLOCK_ROWS == 0 for segment in rows):
        return array
    parts, row = [], 0
    for segment in rows:
        parts.append(lax.slice_in_dim(array, row, row + segment.rows, axis=axis))
        row += padded_rows(segment.rows)
    return jnp.concatenate(parts, axis=axis)

"""What the Hopper kernel is told to do, block by block, against the rows' intervals: its masks never run on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, LONG_CASES, Case

from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import row_bounds
from pallas_kernels.flash_attention.work import (
    BLOCK_ROWS,
    END,
    FIRST_STOP,
    KEY_ALIGNMENT,
    RANGE_COLUMNS,
    ROW,
    START,
    block_order,
    padded_rows,
    work_table,
)


@pytest.mark.parametrize(
    ("case", "block_keys", "alignment"),
    [*((case, 128, KEY_ALIGNMENT) for case in CASES), *((case, 64, 128) for case in (*CASES[::4], *LONG_CASES))],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_row_sees_its_interval_and_nothing_else(case: Case, block_keys: int, alignment: int) -> None:
    """Tiles without a mask hold keys that all rows of the block see; with one, the rule below; others are not read.

    The rule of the masked tiles: row r of a block sees ``start <= key < min(first_stop + r, end)``.
    """
    kv = tuple(jnp.zeros((case.batch, length, 1, 8), jnp.bfloat16) for length in case.ranges)
    rows = case.row_segments(True)
    call = AttentionCall(jnp.zeros((case.batch, case.rows, 1, 8), jnp.bfloat16), kv, kv, rows, 1.0)
    table = np.asarray(jax.jit(lambda: work_table(call, block_keys, alignment))())
    keys = sum(case.ranges)
    first, stop = (np.broadcast_to(np.asarray(a), (case.batch, case.rows)) for a in row_bounds(rows, case.batch, keys))
    index = np.arange(keys)
    wanted = (first[..., None] <= index) & (index < stop[..., None])
    found = np.zeros_like(wanted)
    done = []
    for place, (number, row, padded) in enumerate(block_order(call)):
        before = sum(segment.rows for segment in call.rows[:number]) + row
        here = slice(before, before + min(BLOCK_ROWS, call.rows[number].rows - row))
        done.append(padded)
        for batch in range(case.batch):
            line = table[batch, place]
            assert line[ROW] == padded
            rule = (line[START] <= index) & (
                index[None] < np.minimum(line[FIRST_STOP] + np.arange(here.stop - here.start)[:, None], line[END])
            )
            base = 0
            for length, (begin, head, full, tiles) in zip(
                case.ranges, line[RANGE_COLUMNS:].reshape(-1, 4), strict=True
            ):
                assert begin % alignment == 0
                for tile in range(tiles):
                    low = base + begin + tile * block_keys
                    covered = slice(low, min(low + block_keys, base + length))
                    if head <= tile < head + full:
                        assert covered.stop - covered.start == block_keys
                        found[batch, here, covered] = True
                    else:
                        found[batch, here, covered] = rule[:, covered]
                base += length
    np.testing.assert_array_equal(found, wanted)
    assert sorted(done) == list(range(0, sum(padded_rows(segment.rows) for segment in call.rows), BLOCK_ROWS))

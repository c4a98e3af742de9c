"""Row-interval attention in the Triton language: one program for 128 rows of one head, two loops per key range."""

import triton
import triton.language as tl

from pallas_kernels.online_softmax import attend, finish


@triton.jit
def _attend_range(
    q, k, v, acc, peak, total, columns, base, start, last_stop, stop,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
):  # fmt: skip
    """All tiles of one key range: first those that every row sees entirely, then those that need a mask.

    ``columns`` points to the range's four columns of the work table (`work.work_table`).
    """
    first, head, full, tiles = tl.load(columns), tl.load(columns + 1), tl.load(columns + 2), tl.load(columns + 3)
    slot = tl.arange(0, BLOCK_KEYS)
    place = slot[:, None] * STRIDE + tl.arange(0, DIM)[None, :]
    for tile in range(head, head + full):
        offset = (first + tile * BLOCK_KEYS).to(tl.int64) * STRIDE
        k_tile, v_tile = tl.load(k + offset + place), tl.load(v + offset + place)
        acc, peak, total = attend(q, k_tile, v_tile, acc, peak, total, None, SCALE_LOG2)
    for step in range(0, tiles - full):
        tile = tl.where(step < head, step, step + full)
        key = first + tile * BLOCK_KEYS + slot
        number = base + key
        read = (key < LENGTH) & (number >= start) & (number < last_stop)
        offset = (first + tile * BLOCK_KEYS).to(tl.int64) * STRIDE
        # Unread slots may hold NaN; as zeros they cannot pass it on.
        k_tile = tl.load(k + offset + place, mask=read[:, None], other=0.0)
        v_tile = tl.load(v + offset + place, mask=read[:, None], other=0.0)
        visible = read[None, :] & (number[None, :] < stop[:, None])
        acc, peak, total = attend(q, k_tile, v_tile, acc, peak, total, visible, SCALE_LOG2)
    return acc, peak, total


@triton.jit
def flash_attention_rows(
    table, q_ptr, k0, v0, k1, v1, k2, v2, out_ptr, lse_ptr,
    LENGTH0: tl.constexpr, LENGTH1: tl.constexpr, LENGTH2: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    TABLE_COLUMNS: tl.constexpr, RANGE_COLUMNS: tl.constexpr, SCALE_LOG2: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Programs: (query head, block of rows in the order of the table, batch). A length of 0: no such range."""
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = table + (batch * tl.num_programs(1) + block) * TABLE_COLUMNS
    start, first_stop, end = tl.load(columns), tl.load(columns + 1), tl.load(columns + 2)
    last_stop, first_row = tl.load(columns + 3), tl.load(columns + 4)
    row = tl.arange(0, BLOCK_ROWS)
    stop = tl.minimum(end, first_stop + row)
    place = row[:, None] * (HEADS * DIM) + tl.arange(0, DIM)[None, :]
    corner = ((batch * ROWS + first_row) * HEADS + head) * DIM
    q = tl.load(q_ptr + corner + place)

    acc = tl.zeros((BLOCK_ROWS, DIM), tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    STRIDE: tl.constexpr = KV_HEADS * DIM
    kv = (head // (HEADS // KV_HEADS)) * DIM
    columns += RANGE_COLUMNS
    at = batch * LENGTH0 * STRIDE + kv
    acc, peak, total = _attend_range(
        q, k0 + at, v0 + at, acc, peak, total, columns, 0, start, last_stop, stop,
        LENGTH0, STRIDE, DIM, BLOCK_KEYS, SCALE_LOG2,
    )  # fmt: skip
    if LENGTH1 > 0:
        at = batch * LENGTH1 * STRIDE + kv
        acc, peak, total = _attend_range(
            q, k1 + at, v1 + at, acc, peak, total, columns + 4, LENGTH0, start, last_stop, stop,
            LENGTH1, STRIDE, DIM, BLOCK_KEYS, SCALE_LOG2,
        )  # fmt: skip
    if LENGTH2 > 0:
        at = batch * LENGTH2 * STRIDE + kv
        acc, peak, total = _attend_range(
            q, k2 + at, v2 + at, acc, peak, total, columns + 8, LENGTH0 + LENGTH1, start, last_stop, stop,
            LENGTH2, STRIDE, DIM, BLOCK_KEYS, SCALE_LOG2,
        )  # fmt: skip
    out, lse = finish(acc, peak, total, LOG2_E)
    tl.store(out_ptr + corner + place, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + (batch * HEADS + head) * ROWS + first_row + row, lse)

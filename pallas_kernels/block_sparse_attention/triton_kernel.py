"""Block-sparse attention in the Triton language: windows at any start and single columns.

One program for one query tile of one head, as in MInference's own kernel (arXiv 2407.02490): a loop over windows that
all rows see entirely, one over the windows that need a mask, one over gathered columns; an online softmax through all.
"""

import triton
import triton.language as tl

from pallas_kernels.online_softmax import attend, finish


@triton.jit
def block_sparse_rows(
    starts_ptr, counts_ptr, full_ptr, columns_ptr, column_counts_ptr, offsets_ptr, q_ptr, k_ptr, v_ptr,
    out_ptr, lse_ptr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP_KEYS: tl.constexpr, COLUMN_STEP: tl.constexpr,
    WINDOWS: tl.constexpr, COLUMNS: tl.constexpr, SCALE_LOG2: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Programs: (query tile, the longest first; query head; batch). COLUMNS 0: there are none."""
    tiles = tl.num_programs(0)
    tile, head, batch = tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    STRIDE: tl.constexpr = KV_HEADS * DIM
    entry = (batch * HEADS + head) * tiles + tile
    every = tl.arange(0, DIM)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = row < ROWS
    place = ((batch * ROWS + row) * HEADS + head)[:, None] * DIM + every
    q = tl.load(q_ptr + place, mask=exists[:, None], other=0.0)
    last_key = row + tl.load(offsets_ptr + batch)
    at = batch * KEYS * STRIDE + head // (HEADS // KV_HEADS) * DIM
    k_ptr += at
    v_ptr += at
    step = tl.arange(0, STEP_KEYS)
    in_window = step[:, None] * STRIDE + every

    acc = tl.zeros((BLOCK_Q, DIM), tl.float32)
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    entire, count = tl.load(full_ptr + entry), tl.load(counts_ptr + entry)
    for number in range(0, entire):
        start = tl.load(starts_ptr + entry * WINDOWS + number)
        for first in tl.static_range(0, BLOCK_K, STEP_KEYS):
            offset = (start + first).to(tl.int64) * STRIDE
            k, v = tl.load(k_ptr + offset + in_window), tl.load(v_ptr + offset + in_window)
            acc, peak, total = attend(q, k, v, acc, peak, total, None, SCALE_LOG2)
    for number in range(entire, count):
        start = tl.load(starts_ptr + entry * WINDOWS + number)
        for first in tl.static_range(0, BLOCK_K, STEP_KEYS):
            key = start + first + step
            wanted = (key >= 0) & (key < KEYS)
            offset = (start + first).to(tl.int64) * STRIDE
            # Unread slots may hold NaN; as zeros they cannot pass it on.
            k = tl.load(k_ptr + offset + in_window, mask=wanted[:, None], other=0.0)
            v = tl.load(v_ptr + offset + in_window, mask=wanted[:, None], other=0.0)
            visible = wanted[None, :] & (key[None, :] <= last_key[:, None])
            acc, peak, total = attend(q, k, v, acc, peak, total, visible, SCALE_LOG2)
    if COLUMNS > 0:
        used = tl.load(column_counts_ptr + entry)
        line = tl.arange(0, COLUMN_STEP)
        for first in range(0, used, COLUMN_STEP):
            key = tl.load(columns_ptr + entry * COLUMNS + first + line, mask=first + line < used, other=-1)
            wanted = (key >= 0) & (key < KEYS)
            gathered = key.to(tl.int64)[:, None] * STRIDE + every
            k = tl.load(k_ptr + gathered, mask=wanted[:, None], other=0.0)
            v = tl.load(v_ptr + gathered, mask=wanted[:, None], other=0.0)
            visible = wanted[None, :] & (key[None, :] <= last_key[:, None])
            acc, peak, total = attend(q, k, v, acc, peak, total, visible, SCALE_LOG2)
    out, lse = finish(acc, peak, total, LOG2_E)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    tl.store(lse_ptr + (batch * HEADS + head) * ROWS + row, lse, mask=exists)

"""Selection in the Triton language: threshold, ranks and gather without a sort.

First kernel, one program per KV head: all scores in registers, the count-th largest found bit by bit, then
the chosen rows compacted in index order (a running count puts the lowest indices first among equals).
Second kernel, many programs: a chosen row's place is the number of better ones; its K and V go there.
"""

import triton
import triton.language as tl


@triton.jit
def choose_rows(
    scores_ptr, order_ptr, index_ptr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs: (KV head, 1, batch). Scores [B, ROWS, HEADS] -> order and index int32 [B, HEADS, COUNT]."""
    LOWEST: tl.constexpr = -(2**31)
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, WIDTH)
    scores = tl.load(scores_ptr + batch * (ROWS * HEADS) + row * HEADS + head, mask=row < ROWS, other=float("-inf"))
    # float32 -> int32 with the same order; -0.0 and 0.0 become equal.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    order = tl.where(row < ROWS, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)

    # The largest threshold that at least COUNT rows reach, bits from the top, as an unsigned number.
    threshold = tl.full((), 0, tl.int32)
    for step in range(0, 32):
        candidate = threshold | (tl.full((), 1, tl.int32) << (31 - step))
        reached = tl.sum((order >= (candidate ^ LOWEST)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= COUNT, candidate, threshold)
    threshold = threshold ^ LOWEST
    above, equal = order > threshold, order == threshold
    missing = COUNT - tl.sum(above.to(tl.int32), axis=0)
    # Two running counts in the halves of a word: WIDTH is at most 2^15.
    running = tl.cumsum(above.to(tl.int32) | (equal.to(tl.int32) << 16), axis=0)
    above_before, equal_before = running & 0xFFFF, (running >> 16) & 0xFFFF
    chosen = above | (equal & (equal_before <= missing))
    place = (batch * HEADS + head) * COUNT + above_before + tl.minimum(equal_before, missing) - 1
    tl.store(order_ptr + place, order, mask=chosen)
    tl.store(index_ptr + place, row, mask=chosen)


@triton.jit
def place_rows(
    order_ptr, index_ptr, k_ptr, v_ptr, out_index_ptr, k_out_ptr, v_out_ptr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
    PLACE_ROWS: tl.constexpr, PLACE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Programs: (KV head, PLACE_ROWS chosen rows, batch)."""
    LOWEST: tl.constexpr = -(2**31)
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    mine = tl.program_id(1) * PLACE_ROWS + tl.arange(0, PLACE_ROWS)
    exists = mine < COUNT
    chosen = (batch * HEADS + head) * COUNT
    order = tl.load(order_ptr + chosen + mine, mask=exists, other=LOWEST)
    index = tl.load(index_ptr + chosen + mine, mask=exists, other=0)

    rank = tl.zeros((PLACE_ROWS,), tl.int32)
    for first in range(0, COUNT, PLACE_CHUNK):
        others = first + tl.arange(0, PLACE_CHUNK)
        there = others < COUNT
        other = tl.load(order_ptr + chosen + others, mask=there, other=LOWEST)
        # Rows are stored in index order: among equals the earlier one is better.
        earlier = (others[None, :] < mine[:, None]) & (other[None, :] == order[:, None])
        better = ((other[None, :] > order[:, None]) | earlier) & there[None, :]
        rank += tl.sum(better.to(tl.int32), axis=1)

    to = (batch * COUNT + rank) * HEADS + head
    tl.store(out_index_ptr + to, index, mask=exists)
    every = tl.arange(0, DIM)[None, :]
    source = ((batch * ROWS + index) * HEADS + head)[:, None] * DIM + every
    target = to[:, None] * DIM + every
    tl.store(k_out_ptr + target, tl.load(k_ptr + source, mask=exists[:, None]), mask=exists[:, None])
    tl.store(v_out_ptr + target, tl.load(v_ptr + source, mask=exists[:, None]), mask=exists[:, None])

"""A few rows times e4m3 matrices in the Triton language: 8 bits are read, 16 are multiplied."""

import triton
import triton.language as tl


@triton.jit
def skinny_e4m3(
    x_ptr, w_0, w_1, w_2, place, out_ptr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, ROW_SHARES: tl.constexpr, COLUMN_SHARES: tl.constexpr,
    OWN_0: tl.constexpr, OWN_1: tl.constexpr, OWN_2: tl.constexpr, TILES_0: tl.constexpr, TILES_1: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Programs: (tile of BLOCK columns of one of three matrices, part of the depth).

    x [ROWS, DEPTH]; w e4m3 [L, OWN * COLUMN_SHARES, DEPTH * ROW_SHARES]; place int32: layer, and if CUT row and column
    share; out float32 [PARTS, ROWS, COLUMNS], the matrices' columns behind each other, each from a multiple of BLOCK.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    w_ptr, own, first = w_0, OWN_0, 0
    if tile >= TILES_0:
        w_ptr, own, first = w_1, OWN_1, TILES_0
    if tile >= TILES_0 + TILES_1:
        w_ptr, own, first = w_2, OWN_2, TILES_0 + TILES_1
    layer, row_share, column_share = tl.load(place), 0, 0
    if CUT:
        row_share, column_share = tl.load(place + 1), tl.load(place + 2)
    width: tl.constexpr = DEPTH * ROW_SHARES
    column = (tile - first) * BLOCK + tl.arange(0, BLOCK)
    exists = column < own
    row = (layer.to(tl.int64) * COLUMN_SHARES + column_share) * own + column
    w_ptr += row[:, None] * width + row_share * DEPTH
    share: tl.constexpr = (DEPTH + PARTS * STEP - 1) // (PARTS * STEP) * STEP
    begin = part * share
    end = tl.minimum(begin + share, DEPTH)
    inner = tl.arange(0, STEP)
    even: tl.constexpr = DEPTH % STEP == 0
    one = tl.arange(0, TILE)
    total = tl.zeros((BLOCK, TILE), tl.float32)
    for at in range(begin, end, STEP):
        here = at + inner
        there = exists[:, None] if even else exists[:, None] & (here < DEPTH)[None, :]
        given = (one < ROWS)[None, :] if even else (one < ROWS)[None, :] & (here < DEPTH)[:, None]
        x = tl.load(x_ptr + one[None, :] * DEPTH + here[:, None], mask=given, other=0.0)
        w = tl.load(w_ptr + here[None, :], mask=there, other=0.0)
        total = tl.dot(w.to(x.dtype), x, total)
    corner = (part * ROWS).to(tl.int64) * COLUMNS + tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + corner[:, None] + one[None, :] * COLUMNS, total, mask=(one < ROWS)[None, :])

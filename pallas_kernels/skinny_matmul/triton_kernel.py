"""A few rows times e4m3 matrices in the Triton language: the matrices go to the tensor cores as they lie in memory."""

import triton
import triton.language as tl

from pallas_kernels.digits import e4m3_digit, power_of_two


@triton.jit
def skinny_e4m3(
    x_ptr, w_0, w_1, w_2, place, out_ptr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, ROW_SHARES: tl.constexpr, COLUMN_SHARES: tl.constexpr,
    OWN_0: tl.constexpr, OWN_1: tl.constexpr, OWN_2: tl.constexpr, TILES_0: tl.constexpr, TILES_1: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
    DIGITS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Programs: (tile of BLOCK columns of one of three matrices, part of the depth).

    x [ROWS, DEPTH]; w e4m3 [L, OWN * COLUMN_SHARES, DEPTH * ROW_SHARES]; place int32: layer, and if CUT row and column
    share; out float32 [PARTS, ROWS * DIGITS, COLUMNS], to be added up over parts and the digits of a row: the matrices'
    columns behind each other, each from a multiple of BLOCK on. TILE: a power of two from ROWS * DIGITS on, or 16.
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
    row = (layer.to(tl.int64) * COLUMN_SHARES + column_share) * own + tl.minimum(column, own - 1)  # a rest: not stored
    w_ptr += row[:, None] * width + row_share * DEPTH
    share: tl.constexpr = (DEPTH + PARTS * STEP - 1) // (PARTS * STEP) * STEP
    begin = part * share
    end = tl.minimum(begin + share, DEPTH)
    inner, slot = tl.arange(0, STEP), tl.arange(0, TILE)
    line, digit = slot // DIGITS, slot % DIGITS
    given = (line < ROWS)[:, None]
    unit = tl.exp2(-7.0 - 4.0 * digit.to(tl.float32))
    even: tl.constexpr = DEPTH % STEP == 0
    total = tl.zeros((BLOCK, TILE), tl.float32)
    for at in range(begin, end, STEP):
        here = at + inner
        there = (here < DEPTH)[None, :]
        x = tl.load(x_ptr + line[:, None] * DEPTH + here[None, :], mask=given if even else given & there, other=0.0)
        w = tl.load(w_ptr + here[None, :]) if even else tl.load(w_ptr + here[None, :], mask=there, other=0.0)
        x = x.to(tl.float32)
        power, inverse = power_of_two(x)
        codes = e4m3_digit(x * (inverse * 128.0)[:, None], digit[:, None], DIGITS)
        # Summed in float32 from step to step: inside a product Hopper keeps fewer bits.
        total += tl.dot(w, tl.trans(codes)) * (power * unit)[None, :]
    place_of = part * (ROWS * DIGITS) + slot
    column = tile * BLOCK + tl.arange(0, BLOCK)
    mask = (slot < ROWS * DIGITS)[None, :]
    tl.store(out_ptr + place_of.to(tl.int64)[None, :] * COLUMNS + column[:, None], total, mask=mask)

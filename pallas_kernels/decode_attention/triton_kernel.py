"""Decoding over an 8-bit cache in the Triton language: nothing dequantised is written to memory.

Scales multiply what the products give (keys) or take (probabilities), as in KIVI (arXiv 2402.02750). e4m3 keys become
float16 in registers, which holds them exactly; int8 keys are multiplied as integers; values become float16.
"""

import triton
import triton.language as tl

from pallas_kernels.online_softmax import finish


@triton.jit
def _halves(pairs, INT8: tl.constexpr):
    """float16 of the first and of the second of two codes in int16, exact."""
    if INT8:  # 1024 + 128 + code is a float16 whose last bits are those of code + 128; conversions are slow
        first, second = (pairs & 0xFF) ^ 0x6480, ((pairs >> 8) & 0xFF) ^ 0x6480
        return first.to(tl.float16, bitcast=True) - 1152.0, second.to(tl.float16, bitcast=True) - 1152.0
    else:
        first = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        second = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def _prepared(q, INT8: tl.constexpr):
    """(q_0, q_1, unit [R]) of rows q [R, D] float32: q_0 * unit for e4m3 keys, (256 q_0 + q_1) * unit for int8 ones.

    float16 below 2 holds bfloat16's bits; two int8 hold 15 bits of a row's largest value. A row that holds NaN or
    infinity has the unit NaN.
    """
    bits = tl.max(q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1) & 0x7F800000  # as integers NaN is the largest
    bits = tl.maximum(bits, 0x10000000)
    power = tl.where(bits == 0x7F800000, float("nan"), bits.to(tl.float32, bitcast=True))
    q *= (0x7F000000 - bits).to(tl.float32, bitcast=True)[:, None]
    if INT8:
        whole = tl.floor(q * 16256.0 + 0.5).to(tl.int32)  # 127 * 128: rows end below 2, their first digits at 127
        high = (whole + 128) >> 8
        return high.to(tl.int8), (whole - high * 256).to(tl.int8), power / 16256.0
    else:
        return q.to(tl.float16), q.to(tl.float16), power


@triton.jit
def _scores(q_0, q_1, k, INT8: tl.constexpr):
    """float32 [R, T]: rows as `_prepared` gives them times keys k [T, D], in units of the rows."""
    if INT8:
        k = tl.trans(k)
        return (tl.dot(q_0, k) * 256 + tl.dot(q_1, k)).to(tl.float32)
    else:
        return tl.dot(q_0, tl.trans(k.to(tl.float16)))


@triton.jit
def _step(
    q_0, q_1, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, number, end, stop, head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, INT8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys ``number`` [T] against prepared rows [R, D]; base 2. peak and total [R] float32.

    even, odd [R, D / 2] float32: sums of the values' even and odd channels. Values are read two by two: tensor cores
    want neighbouring keys of a channel beside each other, and shared memory turns 16 bits at a time, not 8.
    """
    entry = number.to(tl.int64) * KV_HEADS + head
    place = entry[:, None] * DIM + tl.arange(0, DIM)[None, :]
    pair = entry[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
    v_ptr = v_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    if MASKED:  # unread slots may hold NaN; as zeros they cannot pass it on
        read = number < end
        k, v = (
            tl.load(k_ptr + place, mask=read[:, None], other=0.0),
            tl.load(v_ptr + pair, mask=read[:, None], other=0),
        )
        k_of, v_of = tl.load(k_scale + entry, mask=read, other=0.0), tl.load(v_scale + entry, mask=read, other=0.0)
    else:
        k, v = tl.load(k_ptr + place), tl.load(v_ptr + pair)
        k_of, v_of = tl.load(k_scale + entry), tl.load(v_scale + entry)
    scores = _scores(q_0, q_1, k, INT8) * (q_scale[:, None] * k_of[None, :])
    if MASKED:
        scores = tl.where((number < end)[None, :] & (number[None, :] < stop[:, None]), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    # Probabilities times scales stay at or below 1, whatever the values: float16 ends at 65504.
    largest = tl.max(v_of, axis=0)
    inverse = tl.where(largest > 0, 1.0 / largest, 0.0)
    weights = (p * (v_of * inverse)[None, :]).to(tl.float16)
    first, second = _halves(v, INT8)
    even = even * decay[:, None] + tl.dot(weights, first) * largest
    odd = odd * decay[:, None] + tl.dot(weights, second) * largest
    return even, odd, new_peak, total * decay + tl.sum(p, axis=1)


@triton.jit
def decode_8bit(
    q_ptr, k_ptr, v_ptr, k_scale, v_scale, lengths, offsets, layer, out_ptr, lse_ptr,
    BATCH: tl.constexpr, LAYERS: tl.constexpr, KEYS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    INT8: tl.constexpr, CAUSAL: tl.constexpr, SCALE: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Programs: (KV head and tile of packed rows, part of the keys, batch).

    q 16 bits [B, K, ROWS, D]; k and v 8 bits [L * B, KEYS, K, D], scales float32 [L * B, KEYS, K]. SCALE: of the
    scores, times log2 e. lengths and offsets int32 [B], any integers. out float32 [B, K, PARTS, ROWS, D], lse
    [B, K, PARTS, ROWS].
    """
    place, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, tile = place % KV_HEADS, place // KV_HEADS
    row = tile * TILE + tl.arange(0, TILE)
    exists = row < ROWS
    every = tl.arange(0, DIM)[None, :]
    corner = (batch * KV_HEADS + head) * ROWS + row
    q = tl.load(q_ptr + corner[:, None] * DIM + every, mask=exists[:, None], other=0.0).to(tl.float32)
    q_0, q_1, q_scale = _prepared(q, INT8)
    q_scale *= SCALE

    length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), KEYS)
    stop, last, full = tl.full((TILE,), 0, tl.int32) + length, length, length
    if CAUSAL:
        offset = tl.minimum(tl.maximum(tl.load(offsets + batch), -ROWS // GROUP), KEYS)
        stop = tl.minimum(length, offset + row // GROUP + 1)
        last = tl.minimum(length, offset + tl.minimum(tile * TILE + TILE - 1, ROWS - 1) // GROUP + 1)
        full = tl.minimum(length, offset + tile * TILE // GROUP + 1)
    share = (tl.maximum(last, 0) + PARTS * BLOCK - 1) // (PARTS * BLOCK) * BLOCK
    first = part * share
    end = tl.minimum(first + share, last)
    entire = first + tl.maximum(tl.minimum(full, end) - first, 0) // BLOCK * BLOCK

    mapped = batch // BATCH
    stack = (mapped * LAYERS + tl.load(layer + mapped)) * BATCH + batch % BATCH
    k_ptr += stack * (KEYS * KV_HEADS * DIM)
    v_ptr += stack * (KEYS * KV_HEADS * DIM)
    k_scale += stack * (KEYS * KV_HEADS)
    v_scale += stack * (KEYS * KV_HEADS)
    even, odd = tl.zeros((TILE, DIM // 2), tl.float32), tl.zeros((TILE, DIM // 2), tl.float32)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    slot = tl.arange(0, BLOCK)
    for key in range(first, entire, BLOCK):
        even, odd, peak, total = _step(
            q_0, q_1, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, key + slot, end, stop, head,
            KV_HEADS, DIM, INT8, False,
        )  # fmt: skip
    for key in range(entire, end, BLOCK):
        even, odd, peak, total = _step(
            q_0, q_1, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, key + slot, end, stop, head,
            KV_HEADS, DIM, INT8, True,
        )  # fmt: skip
    out, lse = finish(even, peak, total, LOG2_E)
    out_odd, _ = finish(odd, peak, total, LOG2_E)
    corner = ((batch * KV_HEADS + head) * PARTS + part) * ROWS + row
    channel = corner[:, None] * DIM + 2 * tl.arange(0, DIM // 2)[None, :]
    tl.store(out_ptr + channel, out, mask=exists[:, None])
    tl.store(out_ptr + channel + 1, out_odd, mask=exists[:, None])
    tl.store(lse_ptr + corner, lse, mask=exists)

"""Decoding over an 8-bit cache in the Triton language: keys and values become 16-bit in registers alone.

Scales multiply what the products give (keys) or take (probabilities), as in KIVI (arXiv 2402.02750): nothing
dequantised is written to memory. float16 holds every e4m3 and int8 value exactly.
"""

import triton
import triton.language as tl

from pallas_kernels.online_softmax import finish


@triton.jit
def _halves(pairs, CODE: tl.constexpr):
    """float16 of the first and of the second of two codes in 16 bits."""
    first, second = pairs.to(tl.uint8), (pairs >> 8).to(tl.uint8)
    return first.to(CODE, bitcast=True).to(tl.float16), second.to(CODE, bitcast=True).to(tl.float16)


@triton.jit
def _step(
    q, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, number, end, stop, head,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys ``number`` [T] against the rows q [R, D]; base 2. peak and total [R] float32.

    even, odd [R, D / 2] float32: sums of the values' even and odd channels. Values are read two by two: tensor cores
    want neighbouring keys of a channel beside each other, and shared memory turns 16 bits at a time, not 8.
    """
    entry = number.to(tl.int64) * KV_HEADS + head
    place = entry[:, None] * DIM + tl.arange(0, DIM)[None, :]
    pair = entry[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
    code: tl.constexpr = v_ptr.dtype.element_ty
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
    scores = tl.dot(q, tl.trans(k.to(tl.float16))) * (q_scale[:, None] * k_of[None, :])
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
    first, second = _halves(v, code)
    even = even * decay[:, None] + tl.dot(weights, first) * largest
    odd = odd * decay[:, None] + tl.dot(weights, second) * largest
    return even, odd, new_peak, total * decay + tl.sum(p, axis=1)


@triton.jit
def decode_8bit(
    q_ptr, q_scale_ptr, k_ptr, v_ptr, k_scale, v_scale, lengths, offsets, layer, out_ptr, lse_ptr,
    BATCH: tl.constexpr, LAYERS: tl.constexpr, KEYS: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Programs: (KV head and tile of packed rows, part of the keys, batch).

    q float16 [B, K, ROWS, D] and q_scale float32 [B, K, ROWS] (scale and log2 e in it); k and v 8 bits
    [L * B, KEYS, K, D], scales float32 [L * B, KEYS, K]. out float32 [B, K, PARTS, ROWS, D], lse [B, K, PARTS, ROWS].
    """
    place, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, tile = place % KV_HEADS, place // KV_HEADS
    row = tile * TILE + tl.arange(0, TILE)
    exists = row < ROWS
    every = tl.arange(0, DIM)[None, :]
    corner = (batch * KV_HEADS + head) * ROWS + row
    q = tl.load(q_ptr + corner[:, None] * DIM + every, mask=exists[:, None], other=0.0)
    q_scale = tl.load(q_scale_ptr + corner, mask=exists, other=0.0)

    length = tl.load(lengths + batch)
    stop, last, full = tl.full((TILE,), 0, tl.int32) + length, length, length
    if CAUSAL:
        offset = tl.load(offsets + batch)
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
            q, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, key + slot, end, stop, head,
            KV_HEADS, DIM, False,
        )  # fmt: skip
    for key in range(entire, end, BLOCK):
        even, odd, peak, total = _step(
            q, q_scale, k_ptr, v_ptr, k_scale, v_scale, even, odd, peak, total, key + slot, end, stop, head,
            KV_HEADS, DIM, True,
        )  # fmt: skip
    out, lse = finish(even, peak, total, LOG2_E)
    out_odd, _ = finish(odd, peak, total, LOG2_E)
    corner = ((batch * KV_HEADS + head) * PARTS + part) * ROWS + row
    channel = corner[:, None] * DIM + 2 * tl.arange(0, DIM // 2)[None, :]
    tl.store(out_ptr + channel, out, mask=exists[:, None])
    tl.store(out_ptr + channel + 1, out_odd, mask=exists[:, None])
    tl.store(lse_ptr + corner, lse, mask=exists)

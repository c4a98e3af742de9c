"""Row-interval attention composed of cuDNN calls and merged by log-sum-exp.

cuDNN knows two masks that matter here: a prefix of the keys (its length per batch entry on the device)
and a causal triangle aligned top-left. Each row segment and key range is cut into pieces of those forms:
keys before the triangle are a prefix once the range is rolled so that its first visible key comes first;
a triangle must begin at a key known while tracing. What cannot be cut that way is refused.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels.device import Device, refuse_before_ampere
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.eight_bit import refuse_eight_bit
from pallas_kernels.flash_attention.rows import RowSegment, per_batch, static


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + rows) of q against keys [key, key + keys) of one range whose first key is ``base``."""

    source: int
    row: int
    rows: int
    key: int
    keys: int
    base: int
    causal: bool
    number: int
    segment: RowSegment

    @property
    def first_key(self) -> int:
        """Number of the piece's first key among the concatenated ranges."""
        return self.base + self.key


def _cut(call: AttentionCall) -> tuple[list[Piece], str | None]:
    """The pieces in row order, or the reason why there are none."""
    pieces: list[Piece] = []
    row = 0
    for number, segment in enumerate(call.rows):
        start, offset, end = static(segment.start), static(segment.offset), static(segment.end)
        if offset is None:
            return [], (
                f"needs each segment's offset as an int; that of segment {number} is only known at run time "
                "(where rows see all keys or none, pass a large offset and move end)"
            )
        base = 0
        for source, key in enumerate(call.k):
            length = key.shape[1]
            stop = length if end is None else min(length, end - base)
            begin = 0 if start is None else max(0, start - base)
            # Every row of the segment sees keys below the diagonal's first key, offset + 1.
            diagonal = min(max(offset - base, 0), length)
            if (full := min(diagonal, stop)) > begin:
                pieces.append(Piece(source, row, segment.rows, begin, full - begin, base, False, number, segment))
            tail = min(stop, offset - base + segment.rows)
            if tail > max(diagonal, begin):
                if begin > diagonal:
                    return [], f"cannot start a causal triangle at key {start} inside its range (segment {number})"
                late = max(base - offset, 0)  # rows that end before this range begins
                pieces.append(
                    Piece(
                        source, row + late, segment.rows - late, diagonal, tail - diagonal, base, True, number, segment
                    )
                )
            base += length
        row += segment.rows
    return pieces, None


def refuse(call: AttentionCall, device: Device) -> str | None:
    """Why cuDNN cannot serve the call on the device, or None if it can."""
    if reason := refuse_before_ampere(device) or refuse_eight_bit(call, device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    limit = 256 if (device.compute_capability or ()) >= (9, 0) else 128
    if (dim := call.q.shape[-1]) % 8 or dim > limit:
        return f"takes head dimensions that are multiples of 8 up to {limit}, q has {dim}"
    return _cut(call)[1]


def is_one_call(call: AttentionCall, device: Device) -> bool:
    """Whether cuDNN serves the call on the device without a merge: then its own backward pass does too."""
    pieces, _ = _cut(call)
    return refuse(call, device) is None and len(pieces) == 1 and pieces[0].rows == call.q.shape[1]


def _attention(q, k, v, scale, mask, length=None):
    """One cuDNN call: out in q's dtype and float32 lse [B, H, rows].

    ``jax.nn.dot_product_attention`` is this call too, but rounds the log-sum-exp to q's dtype (bfloat16:
    errors of 3% in a merge), therefore the layer below it.
    """
    lengths = {}
    if length is not None:
        lengths = {"q_seqlen": jnp.full((q.shape[0],), q.shape[1], jnp.int32), "kv_seqlen": length}
    out, lse = fused.dot_product_attention(q, k, v, scale=scale, mask_type=mask, return_residual=True, **lengths)
    return out, lse.astype(jnp.float32).reshape(q.shape[0], q.shape[2], q.shape[1])


def _roll_each(array: jax.Array, shift: jax.Array) -> jax.Array:
    """Each batch entry of [B, T, ...] moved ``shift[b]`` places towards its front, cyclically."""
    return jax.vmap(lambda one, places: jnp.roll(one, -places, axis=0))(array, shift)


def _attend_piece(call: AttentionCall, piece: Piece) -> tuple[jax.Array, jax.Array]:
    q = jax.lax.slice_in_dim(call.q, piece.row, piece.row + piece.rows, axis=1)
    k, v = (
        jax.lax.slice_in_dim(ranges[piece.source], piece.key, piece.key + piece.keys, axis=1)
        for ranges in (call.k, call.v)
    )
    segment, first = piece.segment, piece.first_key
    start, end = static(segment.start), static(segment.end)
    starts_here = start is not None and start <= first
    ends_here = end is not None and end >= first + piece.keys
    if starts_here and ends_here:
        mask = fused.MaskType.CAUSAL if piece.causal else fused.MaskType.NO_MASK
        return _attention(q, k, v, call.scale, mask)

    begin = jnp.clip(per_batch(segment.start, call.batch) - first, 0, piece.keys)
    length = jnp.clip(per_batch(segment.end, call.batch) - first, 0, piece.keys)
    if piece.causal:
        # A run-time start inside the triangle cannot be expressed: such rows become NaN rather than wrong.
        broken = (begin > 0) & (begin < length)
        length = jnp.where(begin >= length, 0, length)
        mask = fused.MaskType.PADDING_CAUSAL
    else:
        if not starts_here:
            k, v = _roll_each(k, begin), _roll_each(v, begin)
        length = jnp.maximum(length - begin, 0)
        broken = None
        mask = fused.MaskType.PADDING
    # Keys beyond the length share a tile with read ones: a NaN there would survive its weight of zero.
    read = (jnp.arange(piece.keys, dtype=jnp.int32) < length[:, None])[:, :, None, None]
    k, v = jnp.where(read, k, jnp.zeros_like(k)), jnp.where(read, v, jnp.zeros_like(v))
    out, lse = _attention(q, k, v, call.scale, mask, jnp.maximum(length, 1))
    seen = length[:, None, None] > 0
    out, lse = jnp.where(seen[..., None], out, jnp.zeros_like(out)), jnp.where(seen, lse, -jnp.inf)
    if broken is not None:
        broken = broken[:, None, None]
        out, lse = (jnp.where(a, jnp.full_like(b, jnp.nan), b) for a, b in ((broken[..., None], out), (broken, lse)))
    return out, lse


def _merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Exact union of attentions over disjoint keys: out float32 [B, S, H, D], lse [B, H, S]."""
    lses = jnp.stack([lse for _, lse in parts])
    peak = lses.max(axis=0)
    shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(lses - shift)
    total = weights.sum(axis=0)
    seen = ~jnp.isneginf(peak)
    safe = jnp.where(seen, total, 1.0)
    shares = jnp.moveaxis(weights / safe, -1, -2)[..., None]  # [parts, B, S, H, 1]
    out = sum(share * part.astype(jnp.float32) for share, (part, _) in zip(shares, parts, strict=True))
    return out, jnp.where(seen, shift + jnp.log(safe), -jnp.inf)


def one_call(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out and lse of a call that `is_one_call`; ``out`` is differentiable, lse counts as a constant."""
    out, lse = _attend_piece(call, _cut(call)[0][0])
    return out, jax.lax.stop_gradient(lse)


def compose(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S], merged from several cuDNN calls.

    Not differentiable: the merge needs the gradient of lse, which cuDNN lacks.
    """
    pieces, _ = _cut(call)
    outs, lses = [], []
    row = 0
    for number, segment in enumerate(call.rows):
        mine = [piece for piece in pieces if piece.number == number]
        edges = sorted({row, row + segment.rows, *(piece.row for piece in mine)})
        parts = [(_attend_piece(call, piece), piece) for piece in mine]
        for low, high in itertools.pairwise(edges):
            here = [
                (out[:, low - piece.row : high - piece.row], lse[:, :, low - piece.row : high - piece.row])
                for (out, lse), piece in parts
                if piece.row <= low
            ]
            if here:
                out, lse = _merge(here) if len(here) > 1 else here[0]
            else:
                batch, _, heads, dim = call.q.shape
                out = jnp.zeros((batch, high - low, heads, dim), call.q.dtype)
                lse = jnp.full((batch, heads, high - low), -jnp.inf, jnp.float32)
            outs.append(out.astype(call.q.dtype))
            lses.append(lse)
        row += segment.rows
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)

"""Attention whose products take e4m3: how queries, keys and values are quantised before a kernel sees them.

Keys lose the mean of those that are read: it moves all scores of a row alike, so the softmax stays and the log-sum-exp
gets it back (SageAttention, arXiv 2410.02367). A query row has a scale, the keys and the values of a KV head have one
each; e4m3 is a floating type, so a finer scale would only help what underflows. Probabilities are multiplied by 256,
which moves the least one that is kept from 2^-9 to 2^-17.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.rows import RowSegment, per_batch
from pallas_kernels.float8 import FP8, LARGEST, LEAST_SCALE, quantise

P_SHIFT = 8.0
"""log2 of the factor on probabilities."""


@dataclass(frozen=True)
class EightBit:
    """Which products of an attention take 8-bit operands: the scores always, with ``values`` the second too."""

    values: bool = True


@dataclass(frozen=True)
class Quantised:
    """Operands of a call.

    q e4m3 [B, S, H, D]; k e4m3, ranges [B, T_i, K, D]; v e4m3 too or as they were. Score of a row and a key:
    ``row_scale`` float32 [B, H, S] times q . k, plus ``shift`` float32 [B, H, S], the same for all keys of the row;
    ``value_scale`` float32 [B, H] multiplies the result.
    """

    q: jax.Array
    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    row_scale: jax.Array
    shift: jax.Array
    value_scale: jax.Array | None


def read_keys(rows: tuple[RowSegment, ...], batch: int, lengths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """For each range, bool [B, T_i]: the keys that some row sees."""
    masks, base = [], 0
    for length in lengths:
        key = base + jnp.arange(length, dtype=jnp.int32)[None]
        seen = jnp.zeros((batch, length), bool)
        for segment in rows:
            start, offset, end = (per_batch(b, batch)[:, None] for b in (segment.start, segment.offset, segment.end))
            seen |= (key >= start) & (key < jnp.minimum(end, offset + segment.rows))
        masks.append(seen)
        base += length
    return tuple(masks)


def _head_scale(arrays: list[jax.Array]) -> jax.Array:
    """[B, K]: the largest magnitude of all ranges becomes 448."""
    peaks = [jnp.max(jnp.abs(array), axis=(1, 3)) for array in arrays]
    return jnp.maximum(jnp.max(jnp.stack(peaks), axis=0) * jnp.float32(1 / LARGEST), LEAST_SCALE)


def quantise_call(
    q: jax.Array, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], rows: tuple[RowSegment, ...],
    scale: float, eight: EightBit,
) -> Quantised:  # fmt: skip
    """The operands of attention of q over the ranges k, v (shapes as in `AttentionCall`)."""
    batch, _, heads, _ = q.shape
    group = heads // k[0].shape[2]
    masks = [mask[:, :, None, None] for mask in read_keys(rows, batch, tuple(key.shape[1] for key in k))]
    read = [jnp.where(mask, key.astype(jnp.float32), 0.0) for key, mask in zip(k, masks, strict=True)]
    count = jnp.maximum(sum(mask.sum(axis=1) for mask in masks), 1).astype(jnp.float32)
    mean = sum(key.sum(axis=1) for key in read) / count  # [B, K, D]
    centred = [jnp.where(mask, key - mean[:, None], 0.0) for key, mask in zip(read, masks, strict=True)]
    key_scale = _head_scale(centred)
    q8, q_scale = quantise(q)
    row_scale = scale * q_scale[..., 0].transpose(0, 2, 1) * jnp.repeat(key_scale, group, axis=1)[:, :, None]
    row_scale = jnp.where(jnp.isfinite(row_scale), row_scale, 1.0)  # NaN stays in the operands, where masks reach it
    grouped = q.reshape(*q.shape[:2], -1, group, q.shape[-1]).astype(jnp.float32)
    shift = scale * jnp.einsum("bskgd,bkd->bkgs", grouped, mean, precision="highest").reshape(row_scale.shape)
    k8 = tuple((key * (1 / key_scale)[:, None, :, None]).astype(FP8) for key in centred)
    if not eight.values:
        return Quantised(q8, k8, tuple(v), row_scale, shift, None)
    wide = [jnp.where(mask, value.astype(jnp.float32), 0.0) for value, mask in zip(v, masks, strict=True)]
    value_scale = _head_scale(wide)
    v8 = tuple((value * (1 / value_scale)[:, None, :, None]).astype(FP8) for value in wide)
    return Quantised(q8, k8, v8, row_scale, shift, jnp.repeat(value_scale, group, axis=1))


def shifted(lse: jax.Array, shift: jax.Array) -> jax.Array:
    """The log-sum-exp with what the keys' mean took away; a row that sees nothing keeps -inf."""
    return jnp.where(jnp.isneginf(lse), lse, lse + shift)


def refuse_eight_bit(call, device) -> str | None:
    """Why an implementation without 8-bit products cannot serve the call, or None if it can."""
    del device
    return None if call.eight is None else "multiplies in q's dtype only; 8-bit products were asked for"


def round_probabilities(p: jax.Array) -> jax.Array:
    """Probabilities, 0 to 1, as the second product of a kernel sees them; float32."""
    return (p * 2**P_SHIFT).astype(FP8).astype(jnp.float32) * 2**-P_SHIFT

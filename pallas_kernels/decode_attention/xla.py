"""Decoding through XLA: one batched product for few rows, tiles for many."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.flash_attention.xla_chunked import chunked_attention

FEW_ROWS = 16


def xla(call: DecodeCall) -> tuple[jax.Array, jax.Array]:
    """out float32 [B, M, H, D] and lse_nat float32 [B, H, M]."""
    call = call.one_layer()
    first, stop = call.bounds
    if call.quantised:
        return _quantised(call, stop)
    if call.q.shape[1] > FEW_ROWS:
        return chunked_attention(call.q, call.k, call.v, first, stop, call.scale)
    return _few_rows(call, stop)


def _quantised(call: DecodeCall, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """FEW_ROWS rows at a time, so that nothing dequantised is kept however many there are."""
    batch, rows, heads, dim = call.q.shape
    if rows <= FEW_ROWS:
        return _few_rows(call, stop)
    parts = -(-rows // FEW_ROWS)
    pad = parts * FEW_ROWS - rows
    split = lambda a: jnp.moveaxis(a.reshape(batch, parts, FEW_ROWS, *a.shape[2:]), 1, 0)  # noqa: E731
    q = split(jnp.pad(call.q, ((0, 0), (0, pad), (0, 0), (0, 0))))
    ends = split(jnp.pad(stop, ((0, 0), (0, pad))))
    out, lse = jax.lax.map(lambda part: _few_rows(dataclasses.replace(call, q=part[0]), part[1]), (q, ends))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, parts * FEW_ROWS, heads, dim)
    return out[:, :rows], jnp.moveaxis(lse, 0, 2).reshape(batch, heads, parts * FEW_ROWS)[..., :rows]


def _few_rows(call: DecodeCall, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, dim = call.q.shape
    keys, kv_heads = call.k.shape[1:3]
    precision = "highest" if call.q.dtype == jnp.float32 else None
    q = call.q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    key = jnp.arange(keys, dtype=jnp.int32)
    visible = (key < stop[..., None])[:, None, None]  # [B, 1, 1, M, T]
    # Slots beyond the length may hold NaN, and 0 * NaN is NaN.
    exists = (key < call.lengths[:, None])[..., None]  # [B, T, 1]
    v = jnp.where(exists[..., None], call.v, jnp.zeros_like(call.v)).astype(call.q.dtype)
    k = call.k.astype(call.q.dtype)
    scores = jnp.einsum("bmkgd,btkd->bkgmt", q, k, preferred_element_type=jnp.float32, precision=precision)
    if call.k_scale is not None:
        scores = scores * _by_key(call.k_scale)
    scores = jnp.where(visible, scores * call.scale, -jnp.inf)
    peak = jnp.max(scores, axis=-1, initial=-jnp.inf)
    shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(scores - shift[..., None])
    total = weights.sum(axis=-1)
    safe = jnp.where(total != 0, total, 1.0)
    largest = None
    if call.v_scale is not None:  # times scales at or below 1, so that 16 bits hold the products as they hold weights
        v_scale = jnp.where(exists, call.v_scale, 0.0)
        largest = jnp.max(v_scale, axis=1)  # [B, K]
        weights = weights * _by_key(v_scale / jnp.where(largest > 0, largest, 1.0)[:, None])
    out = jnp.einsum(
        "bkgmt,btkd->bkgmd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    out = out if largest is None else out * largest[:, :, None, None, None]
    out = (out / safe[..., None]).transpose(0, 3, 1, 2, 4).reshape(call.q.shape)
    lse = jnp.where(total != 0, shift + jnp.log(safe), -jnp.inf)
    return out, lse.reshape(batch, heads, rows)


def _by_key(scale: jax.Array) -> jax.Array:
    """[B, T, K] beside scores [B, K, G, M, T]."""
    return scale.transpose(0, 2, 1)[:, :, None, None, :]

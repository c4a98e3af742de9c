"""Decoding through XLA: one batched product for few rows, tiles for many."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.flash_attention.xla_chunked import chunked_attention

FEW_ROWS = 16


def xla(call: DecodeCall) -> tuple[jax.Array, jax.Array]:
    """out float32 [B, M, H, D] and lse_nat float32 [B, H, M]."""
    call = call.one_layer()
    first, stop = call.bounds
    if call.q.shape[1] > FEW_ROWS:
        return chunked_attention(call.q, call.k, call.v, first, stop, call.scale)
    return _few_rows(call, stop)


def _few_rows(call: DecodeCall, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, dim = call.q.shape
    keys, kv_heads = call.k.shape[1:3]
    precision = "highest" if call.q.dtype == jnp.float32 else None
    q = call.q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    key = jnp.arange(keys, dtype=jnp.int32)
    visible = (key < stop[..., None])[:, None, None]  # [B, 1, 1, M, T]
    # Slots beyond the length may hold NaN, and 0 * NaN is NaN.
    v = jnp.where((key < call.lengths[:, None])[..., None, None], call.v, jnp.zeros_like(call.v))
    scores = jnp.einsum("bmkgd,btkd->bkgmt", q, call.k, preferred_element_type=jnp.float32, precision=precision)
    scores = jnp.where(visible, scores * call.scale, -jnp.inf)
    peak = jnp.max(scores, axis=-1, initial=-jnp.inf)
    shift = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(scores - shift[..., None])
    total = weights.sum(axis=-1)
    safe = jnp.where(total != 0, total, 1.0)
    out = jnp.einsum(
        "bkgmt,btkd->bkgmd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    out = (out / safe[..., None]).transpose(0, 3, 1, 2, 4).reshape(call.q.shape)
    lse = jnp.where(total != 0, shift + jnp.log(safe), -jnp.inf)
    return out, lse.reshape(batch, heads, rows)

"""The definition: plain float32 softmax over all keys. Memory grows with S x T."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import row_bounds


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, S, H, D] over k, v [B, T, K, D] where ``visible`` (bool, broadcastable to [B, H, S, T]).

    Returns float32 out [B, S, H, D] and natural log-sum-exp [B, H, S]; a row that sees nothing gets 0 and -inf.
    """
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    visible = jnp.broadcast_to(visible, (batch, heads, rows, k.shape[1]))
    grouped = visible.reshape(batch, kv_heads, heads // kv_heads, rows, k.shape[1])
    # Slots that no row sees may hold anything, NaN too; 0 * NaN would carry it into the result or a gradient.
    read = jnp.moveaxis(grouped.any(axis=(2, 3)), 1, 2)[..., None]
    k32, v32 = (jnp.where(read, a.astype(jnp.float32), 0.0) for a in (k, v))
    q32 = q.astype(jnp.float32).reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    scores = scale * jnp.einsum("bskgd,btkd->bkgst", q32, k32, precision="highest")
    scores = jnp.where(grouped, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    seen = grouped.any(axis=-1)
    safe = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgst,btkd->bskgd", weights / safe[..., None], v32, precision="highest")
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
    return out.reshape(q.shape), lse.reshape(batch, heads, rows)


def reference(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    k, v = jnp.concatenate(call.k, axis=1), jnp.concatenate(call.v, axis=1)
    first, stop = row_bounds(call.rows, call.batch, call.keys)
    key = jnp.arange(call.keys, dtype=jnp.int32)
    visible = (first[..., None] <= key) & (key < stop[..., None])
    out, lse = softmax_attention(call.q, k, v, visible[:, None], call.scale)
    return out.astype(call.q.dtype), lse

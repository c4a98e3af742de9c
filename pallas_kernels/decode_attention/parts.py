"""Rows of all query heads of a KV head packed together, and partial results over parts of the keys merged."""

import jax
import jax.numpy as jnp


def packed(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, M, H, D] as [B, K, M * G, D]: row m * G + g is row m of query head g of the group."""
    batch, rows, heads, dim = q.shape
    group = heads // kv_heads
    return q.reshape(batch, rows, kv_heads, group, dim).swapaxes(1, 2).reshape(batch, kv_heads, rows * group, dim)


def merged(out: jax.Array, lse: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """out [B, M, H, D] and lse_nat [B, H, M] from parts [B, K, parts, M * G, D] and [B, K, parts, M * G], float32."""
    batch, kv_heads = lse.shape[:2]
    group = lse.shape[3] // rows
    peak = lse.max(axis=2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=2)
    seen = total != 0  # true for NaN, which must not pass for a row that saw nothing
    safe = jnp.where(seen, total, 1.0)
    whole = (out * weights[..., None]).sum(axis=2) / safe[..., None]
    whole_lse = jnp.where(seen, peak[:, :, 0] + jnp.log(safe), -jnp.inf)

    def unpacked(array):  # [B, K, M * G, ...] -> [B, M, H, ...]
        array = array.reshape(batch, kv_heads, rows, group, *array.shape[3:])
        return array.swapaxes(1, 2).reshape(batch, rows, kv_heads * group, *array.shape[4:])

    return unpacked(whole), unpacked(whole_lse).swapaxes(1, 2)

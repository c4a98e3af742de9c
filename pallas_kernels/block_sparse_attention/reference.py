"""The definition: the dense mask of the key tiles and a plain float32 softmax."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.call import BlockSparseCall
from pallas_kernels.flash_attention.reference import softmax_attention


def visible_keys(call: BlockSparseCall) -> jax.Array:
    """bool [B, H, S, T]: which key each row of each query head sees."""
    rows, keys = call.q.shape[1], call.k.shape[1]
    key = jnp.arange(keys, dtype=jnp.int32)

    def used(entries, counts):
        return jnp.arange(entries.shape[-1], dtype=jnp.int32) < counts[..., None]

    starts = call.tiles.starts[..., None]
    windows = (starts <= key) & (key < starts + call.blocks.k)
    seen = (windows & used(call.tiles.starts, call.tiles.counts)[..., None]).any(axis=-2)
    if call.tiles.columns is not None:
        lines = call.tiles.columns[..., None] == key
        seen |= (lines & used(call.tiles.columns, call.tiles.column_counts)[..., None]).any(axis=-2)
    per_row = jnp.repeat(seen, call.blocks.q, axis=2)[:, :, :rows]
    causal = key <= jnp.arange(rows, dtype=jnp.int32)[:, None] + call.causal_offset[:, None, None]
    return per_row & causal[:, None]


def reference(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    out, lse = softmax_attention(call.q, call.k, call.v, visible_keys(call), call.scale)
    return out.astype(call.q.dtype), lse

"""One validated call of block_sparse_attention."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError
from pallas_kernels.flash_attention.rows import clip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyTiles:
    """Which keys each tile of query rows sees, per query head; n_q = ceil(S / block_q) tiles.

    ``starts`` int32 [B, H, n_q, R]: first keys of windows of ``block_k`` keys, any value, not overlapping;
    the first ``counts`` [B, H, n_q] of them are used. ``columns`` int32 [B, H, n_q, C] and ``column_counts``
    [B, H, n_q]: single keys, outside the windows (MInference's vertical lines); None for none.
    """

    starts: jax.Array
    counts: jax.Array
    columns: jax.Array | None = None
    column_counts: jax.Array | None = None


@dataclass(frozen=True)
class BlockSparseCall:
    """q [B, S, H, D]; k and v [B, T, K, D]; row i sees only keys j <= i + causal_offset[b]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tiles: KeyTiles
    block_q: int
    block_k: int
    causal_offset: jax.Array
    scale: float

    def __post_init__(self) -> None:
        q, k, tiles = self.q, self.k, self.tiles
        if q.ndim != 4 or k.ndim != 4 or k.shape != self.v.shape or k.shape[::3] != q.shape[::3]:
            raise KernelInputError(f"q {q.shape}, k {k.shape}, v {self.v.shape} must be [B, S, H, D] and [B, T, K, D]")
        if q.shape[2] % k.shape[2]:
            raise KernelInputError(f"{k.shape[2]} KV heads do not divide {q.shape[2]} query heads")
        if min(self.block_q, self.block_k) < 1:
            raise KernelInputError(f"block_q {self.block_q} and block_k {self.block_k} must be at least 1")
        lead = (q.shape[0], q.shape[2], -(-q.shape[1] // self.block_q))
        if tiles.starts.ndim != 4 or tiles.starts.shape[:3] != lead or tiles.counts.shape != lead:
            raise KernelInputError(
                f"starts {tiles.starts.shape} and counts {tiles.counts.shape} must begin with {lead}"
            )
        columns, counts = tiles.columns, tiles.column_counts
        if (columns is None) != (counts is None):
            raise KernelInputError("columns and column_counts go together")
        if columns is not None and counts is not None and (columns.shape[:3] != lead or counts.shape != lead):
            raise KernelInputError(f"columns {columns.shape} and their counts {counts.shape} must begin with {lead}")


def make_call(q, k, v, tiles, block_q, block_k, causal_offset, scale) -> BlockSparseCall:
    """Validate, clip starts and offset to what changes anything, and let all arrays vary over the same mesh axes."""
    keys = k.shape[1]
    offset = jnp.broadcast_to(jnp.asarray(clip(causal_offset, -q.shape[1], keys), jnp.int32), q.shape[:1])
    tiles = replace(tiles, starts=jnp.clip(tiles.starts, -block_k, keys))
    q, k, v, tiles, offset = vary_together((q, k, v, tiles, offset))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return BlockSparseCall(q, k, v, tiles, block_q, block_k, offset, scale)

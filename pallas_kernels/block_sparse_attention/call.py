"""One validated call of block_sparse_attention."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError
from pallas_kernels.flash_attention.rows import clip


@dataclass(frozen=True)
class Blocks:
    """Sizes of block-sparse attention: ``q`` rows of a query tile, ``k`` keys of a window."""

    q: int
    k: int

    def __post_init__(self) -> None:
        if min(self.q, self.k) < 1:
            raise KernelInputError(f"blocks of {self.q} rows and {self.k} keys; both must be at least 1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyTiles:
    """Which keys each tile of query rows sees, per query head; n_q = ceil(S / blocks.q) tiles.

    ``starts`` int32 [B, H, n_q, R]: first keys of windows of ``blocks.k`` keys, any value, not overlapping;
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
    blocks: Blocks
    causal_offset: jax.Array
    scale: float

    def __post_init__(self) -> None:
        q, k, tiles = self.q, self.k, self.tiles
        if q.ndim != 4 or k.ndim != 4 or k.shape != self.v.shape or k.shape[::3] != q.shape[::3]:
            raise KernelInputError(f"q {q.shape}, k {k.shape}, v {self.v.shape} must be [B, S, H, D] and [B, T, K, D]")
        if q.shape[2] % k.shape[2]:
            raise KernelInputError(f"{k.shape[2]} KV heads do not divide {q.shape[2]} query heads")
        lead = (q.shape[0], q.shape[2], -(-q.shape[1] // self.blocks.q))
        if tiles.starts.ndim != 4 or tiles.starts.shape[:3] != lead or tiles.counts.shape != lead:
            raise KernelInputError(
                f"starts {tiles.starts.shape} and counts {tiles.counts.shape} must begin with {lead}"
            )
        columns, counts = tiles.columns, tiles.column_counts
        if (columns is None) != (counts is None):
            raise KernelInputError("columns and column_counts go together")
        if columns is not None and counts is not None and (columns.shape[:3] != lead or counts.shape != lead):
            raise KernelInputError(f"columns {columns.shape} and their counts {counts.shape} must begin with {lead}")


def make_call(q, k, v, tiles, blocks, causal_offset, scale) -> BlockSparseCall:
    """Validate, clip starts and offset to what changes anything, and let all arrays vary over the same mesh axes."""
    keys = k.shape[1]
    offset = jnp.broadcast_to(jnp.asarray(clip(causal_offset, -q.shape[1], keys), jnp.int32), q.shape[:1])
    tiles = replace(tiles, starts=jnp.clip(tiles.starts, -blocks.k, keys))
    q, k, v, tiles, offset = vary_together((q, k, v, tiles, offset))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return BlockSparseCall(q, k, v, tiles, blocks, offset, scale)

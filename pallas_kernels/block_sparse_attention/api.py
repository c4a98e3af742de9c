"""block_sparse_attention: causal attention over chosen windows and columns of keys."""

import jax

from pallas_kernels.block_sparse_attention import triton as triton_backend
from pallas_kernels.block_sparse_attention.call import Blocks, KeyTiles, make_call
from pallas_kernels.block_sparse_attention.reference import reference
from pallas_kernels.block_sparse_attention.xla import xla
from pallas_kernels.dispatch import Implementation, accepts_all, choose

IMPLEMENTATIONS = (
    Implementation("triton", triton_backend.triton, triton_backend.refuse),
    Implementation("xla", xla, accepts_all),
    Implementation("reference", reference, accepts_all, automatic=False),
)


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiles: KeyTiles,
    *,
    blocks: Blocks,
    causal_offset: jax.Array | int = 0,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact softmax over the keys that ``tiles`` grants, and of those only j <= i + causal_offset.

    Serves XAttention (windows at multiples of 128, arXiv 2503.16428) and MInference (vertical-slash: 64-wide
    windows at any start, and single columns, arXiv 2407.02490).

    Args:
      q: [B, S, H, D].
      k, v: [B, T, K, D]; query head h uses KV head h // (H // K).
      tiles: windows and columns per query tile and head (see `KeyTiles`).
      blocks: rows of a query tile and keys of a window.
      causal_offset: int, int32 scalar or [B].
      scale: of the scores; default 1/sqrt(D).
      implementation: None for the automatic choice, or a name, which never falls back.

    Returns:
      out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; a row that sees nothing gets 0 and -inf.

    Raises:
      KernelInputError, Unsupported, ExceptionGroup: as `flash_attention`.
    """
    call = make_call(q, k, v, tiles, blocks, causal_offset, scale)
    return choose("block_sparse_attention", IMPLEMENTATIONS, implementation, call).run(call)

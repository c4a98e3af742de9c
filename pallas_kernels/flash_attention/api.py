"""flash_attention: many query rows, each over one interval of up to three key ranges."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_over, varying_axes
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.flash_attention import cudnn as cudnn_backend
from pallas_kernels.flash_attention import mosaic_gpu as mosaic_backend
from pallas_kernels.flash_attention import triton as triton_backend
from pallas_kernels.flash_attention.call import make_call
from pallas_kernels.flash_attention.eight_bit import EightBit, refuse_eight_bit
from pallas_kernels.flash_attention.recompute import cudnn_attention
from pallas_kernels.flash_attention.reference import reference
from pallas_kernels.flash_attention.rows import RowSegment
from pallas_kernels.flash_attention.xla_chunked import refuse_emulation, xla_chunked

IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_backend.mosaic_gpu, mosaic_backend.refuse),
    Implementation("cudnn", cudnn_attention, cudnn_backend.refuse),
    Implementation("triton", triton_backend.triton, triton_backend.refuse),
    Implementation("xla_chunked", xla_chunked, refuse_emulation),
    Implementation("reference", reference, refuse_eight_bit, automatic=False),
)


def flash_attention(
    q: jax.Array,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rows: Sequence[RowSegment],
    scale: float | None = None,
    implementation: str | None = None,
    eight: EightBit | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact softmax attention in which every row sees one interval of the concatenated key ranges.

    Args:
      q: [B, S, H, D].
      k, v: tuples of one to three ranges [B, T_i, K, D]; key j counts through them in order. Query head h
        uses KV head h // (H // K). They are not concatenated by the GPU kernels.
      rows: segments of consecutive rows; their rows add up to S (see `RowSegment`). Keys that no row
        sees are never used and may hold anything, NaN too.
      scale: of the scores; default 1/sqrt(D).
      implementation: None for the first of the ordered list that accepts the call, or a name, which
        never falls back.
      eight: which products take e4m3 operands (`EightBit`; float32 sums); None: those of q's dtype.

    Returns:
      out [B, S, H, D] in q's dtype, and lse_nat float32 [B, H, S], the natural log-sum-exp of the scaled
      scores. A row that sees nothing gets 0 and -inf.

    Raises:
      KernelInputError: shapes, dtypes or bounds that no implementation could serve, or an unknown name.
      Unsupported: the named implementation refuses (an ExceptionGroup of these if all automatic ones do).
    """
    call = make_call(q, k, v, rows, scale, eight)
    chosen = choose("flash_attention", IMPLEMENTATIONS, implementation, call)
    if call.keys == 0 or call.q.shape[1] == 0:
        batch, length, heads, _ = call.q.shape
        empty = jnp.zeros(call.q.shape, call.q.dtype), jnp.full((batch, heads, length), -jnp.inf, jnp.float32)
        return vary_over(varying_axes(call.q), empty)
    return chosen.run(call)

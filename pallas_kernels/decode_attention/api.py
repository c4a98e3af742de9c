"""decode_attention: few query rows against a long cache; a partial result that shards merge."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_over, varying_axes
from pallas_kernels.decode_attention import mosaic_gpu as mosaic_backend
from pallas_kernels.decode_attention import triton as triton_backend
from pallas_kernels.decode_attention.call import Codes, DecodeCall, make_call
from pallas_kernels.decode_attention.parts import Parts
from pallas_kernels.decode_attention.reference import reference
from pallas_kernels.decode_attention.xla import xla
from pallas_kernels.dispatch import Implementation, accepts_all, choose


def _whole(run: Callable[[DecodeCall], tuple[jax.Array, jax.Array]]) -> Callable[[DecodeCall], Parts]:
    return lambda call: Parts.whole(*run(call.clipped()), call.kv_heads)


IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_backend.mosaic_gpu, mosaic_backend.refuse),
    Implementation("triton", triton_backend.triton, triton_backend.refuse),
    Implementation("xla", _whole(xla), accepts_all),
    Implementation("reference", _whole(reference), accepts_all, automatic=False),
)


def decode_attention(
    q: jax.Array,
    k: jax.Array | Codes,
    v: jax.Array | Codes,
    lengths: jax.Array,
    causal_offset: jax.Array | None = None,
    *,
    layer: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact attention of a few rows over the valid prefix of a cache.

    Args:
      q: [B, M, H, D]; one row a decoding step, up to a few hundred in the query phase.
      k, v: [B, T, K, D]; query head h uses KV head h // (H // K). Slots at or beyond ``lengths`` may
        hold anything, NaN too. With ``layer``: stacks of all layers, [L, B, T, K, D]. Or both ``Codes`` of 8 bits with
        scales float32 [B, T, K] ([L, B, T, K]): a key is its codes times its scale.
      lengths: int32 [B], valid slots per batch entry; 0 is allowed.
      causal_offset: None, or int32 [B]: row i sees key j only if j <= i + causal_offset[b].
      layer: None, or an int32 scalar: which layer of the stacks, which is read where it lies.
      scale: of the scores; default 1/sqrt(D).
      implementation: None for the automatic choice, or a name, which never falls back.

    Returns:
      out float32 [B, M, H, D] and lse_nat float32 [B, H, M], ready to merge with other shards' parts.
      A row that sees nothing gets 0 and -inf.

    Raises:
      KernelInputError, Unsupported, ExceptionGroup: as `flash_attention`.
    """
    return decode_parts(
        q, k, v, lengths, causal_offset, layer=layer, scale=scale, implementation=implementation
    ).merged()


def decode_parts(
    q: jax.Array,
    k: jax.Array | Codes,
    v: jax.Array | Codes,
    lengths: jax.Array,
    causal_offset: jax.Array | None = None,
    *,
    layer: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Parts:
    """`decode_attention` before its merge, for callers who have other keys to merge with: one merge for all of them."""
    call = make_call(q, k, v, lengths, causal_offset, scale, layer)
    chosen = choose("decode_attention", IMPLEMENTATIONS, implementation, call)
    batch, rows, heads, _ = call.q.shape
    if call.keys == 0 or rows == 0:
        empty = jnp.zeros(call.q.shape, jnp.float32), jnp.full((batch, heads, rows), -jnp.inf, jnp.float32)
        out, lse = vary_over(varying_axes(call.q), empty)
        return Parts.whole(out, lse, call.kv_heads)
    parts: Parts = chosen.run(call)
    return parts

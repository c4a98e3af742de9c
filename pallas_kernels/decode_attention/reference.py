"""The definition: plain float32 softmax over the visible keys."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.flash_attention.reference import softmax_attention


def reference(call: DecodeCall) -> tuple[jax.Array, jax.Array]:
    """out float32 [B, M, H, D] and lse_nat float32 [B, H, M]."""
    call = call.one_layer().dequantised()
    _, stop = call.bounds
    visible = jnp.arange(call.k.shape[1], dtype=jnp.int32) < stop[..., None]
    return softmax_attention(call.q, call.k, call.v, visible[:, None], call.scale)

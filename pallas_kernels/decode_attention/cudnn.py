"""Decoding through one cuDNN call over the valid prefix of the cache."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.device import Device
from pallas_kernels.flash_attention import cudnn as prefill
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import RowSegment


def _as_rows(call: DecodeCall) -> AttentionCall:
    call = call.one_layer()
    rows, keys = call.q.shape[1], call.keys
    return AttentionCall(
        call.q, (call.k,), (call.v,), (RowSegment(rows, start=0, offset=keys, end=call.lengths),), call.scale
    )


def refuse(call: DecodeCall, device: Device) -> str | None:
    """Why cuDNN cannot serve the call on the device, or None if it can."""
    if call.causal_offset is not None:
        return "has no causal mask whose offset is known at run time only"
    return prefill.refuse(_as_rows(call), device)


def cudnn(call: DecodeCall) -> tuple[jax.Array, jax.Array]:
    """out float32 [B, M, H, D] (rounded to q's dtype by cuDNN) and lse_nat float32 [B, H, M]."""
    out, lse = prefill.compose(_as_rows(call))
    return out.astype(jnp.float32), lse

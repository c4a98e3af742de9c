"""Row-interval attention in the Triton language: for NVIDIA GPUs before Hopper (compute capability 8.0 and newer).

FlashAttention-2's organisation (arXiv 2307.08691); the device's half is `triton_kernel`.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.device import Device, refuse_before_ampere
from pallas_kernels.flash_attention import work
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.eight_bit import refuse_eight_bit
from pallas_kernels.flash_attention.recompute import with_recomputed_gradient

BLOCK_KEYS = 64
LOG2_E = math.log2(math.e)


def refuse(call: AttentionCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_before_ampere(device) or triton_launch.refuse(device) or refuse_eight_bit(call, device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (16, 32, 64, 128):
        return f"takes head dimension 16, 32, 64 or 128, q has {dim}"
    return None


def forward(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; not differentiable."""
    from pallas_kernels.flash_attention.triton_kernel import flash_attention_rows

    q = work.pad_segments(call.q, call.rows)
    _, rows, heads, dim = q.shape
    table = work.work_table(call, BLOCK_KEYS)
    missing = 3 - len(call.k)  # the kernel takes three ranges; those of length 0 are not read
    pairs = [*zip(call.k, call.v, strict=True), *[(call.k[0], call.v[0])] * missing]
    lengths = [key.shape[1] for key in call.k] + [0] * missing
    launch = triton_launch.Launch(
        name="flash_attention_rows",
        kernel=flash_attention_rows,
        blocks=(heads, table.shape[1]),
        outputs=((q.shape[1:], q.dtype), ((heads, rows), jnp.float32)),
        num_warps=8 if dim > 64 else 4,
        num_stages=2,
        constants={
            **{f"LENGTH{number}": length for number, length in enumerate(lengths)},
            "ROWS": rows,
            "HEADS": heads,
            "KV_HEADS": call.kv_heads,
            "DIM": dim,
            "BLOCK_ROWS": work.BLOCK_ROWS,
            "BLOCK_KEYS": BLOCK_KEYS,
            "TABLE_COLUMNS": table.shape[2],
            "RANGE_COLUMNS": work.RANGE_COLUMNS,
            "SCALE_LOG2": call.scale * LOG2_E,
            "LOG2_E": LOG2_E,
        },
    )
    out, lse = triton_launch.call(launch, table, q, *(array for pair in pairs for array in pair))
    return work.unpad_segments(out, call.rows, 1), work.unpad_segments(lse, call.rows, 2)


def triton(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; the gradient recomputes through XLA."""
    return with_recomputed_gradient(forward, call)

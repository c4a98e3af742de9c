"""Block-sparse attention on NVIDIA GPUs in the Triton language; the device's half is `triton_kernel`."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.block_sparse_attention.call import BlockSparseCall
from pallas_kernels.device import Device, refuse_before_ampere

STEP_KEYS = 64
LOG2_E = math.log2(math.e)


def refuse(call: BlockSparseCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_before_ampere(device) or triton_launch.refuse(device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (16, 32, 64, 128):
        return f"takes head dimension 16, 32, 64 or 128, q has {dim}"
    if call.blocks.q not in (16, 32, 64, 128) or call.blocks.k not in (16, 32, 64, 128):
        return f"takes tiles of 16, 32, 64 or 128 rows and keys, not {call.blocks.q} and {call.blocks.k}"
    return None


def entire_windows(call: BlockSparseCall) -> jax.Array:
    """int32 [B, H, n_q]: how many windows, from the first on, lie inside the cache and before every row of the tile."""
    starts, counts = call.tiles.starts, call.tiles.counts
    first_row = jnp.arange(counts.shape[2], dtype=jnp.int32) * call.blocks.q
    stop = jnp.minimum(first_row + call.causal_offset[:, None] + 1, call.k.shape[1])[:, None, :, None]
    number = jnp.arange(starts.shape[-1], dtype=jnp.int32)
    other = (starts < 0) | (starts + call.blocks.k > stop) | (number >= counts[..., None])
    return jnp.min(jnp.where(other, number, starts.shape[-1]), axis=-1, initial=starts.shape[-1])


def triton(call: BlockSparseCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]."""
    from pallas_kernels.block_sparse_attention.triton_kernel import block_sparse_rows

    _, rows, heads, dim = call.q.shape
    tiles, windows = call.tiles, call.tiles.starts.shape[-1]
    columns, column_counts, most = tiles.starts, tiles.counts, 0  # pointers that the kernel then does not read
    if tiles.columns is not None and tiles.column_counts is not None and tiles.columns.shape[-1]:
        columns, column_counts, most = tiles.columns, tiles.column_counts, tiles.columns.shape[-1]
    launch = triton_launch.Launch(
        name="block_sparse_attention",
        kernel=block_sparse_rows,
        blocks=(tiles.counts.shape[2], heads),
        outputs=((call.q.shape[1:], call.q.dtype), ((heads, rows), jnp.float32)),
        num_warps=8 if call.blocks.q * dim > 64 * 128 else 4,
        num_stages=2,
        constants={
            "ROWS": rows,
            "KEYS": call.k.shape[1],
            "HEADS": heads,
            "KV_HEADS": call.k.shape[2],
            "DIM": dim,
            "BLOCK_Q": call.blocks.q,
            "BLOCK_K": call.blocks.k,
            "STEP_KEYS": min(STEP_KEYS, call.blocks.k),
            "COLUMN_STEP": STEP_KEYS,
            "WINDOWS": windows,
            "COLUMNS": most,
            "SCALE_LOG2": call.scale * LOG2_E,
            "LOG2_E": LOG2_E,
        },
    )
    out, lse = triton_launch.call(
        launch, tiles.starts, tiles.counts, entire_windows(call), columns, column_counts, call.causal_offset,
        call.q, call.k, call.v,
    )  # fmt: skip
    return out, lse

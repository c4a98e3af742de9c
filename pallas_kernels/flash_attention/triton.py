"""Row-interval attention in Pallas Triton: for NVIDIA GPUs before Hopper (compute capability 8.0 and newer).

FlashAttention-2's organisation (arXiv 2307.08691): one program for 128 rows of one head, one loop per range.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import array_type
from pallas_kernels.device import Device, refuse_before_ampere
from pallas_kernels.flash_attention import work
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.recompute import with_recomputed_gradient
from pallas_kernels.flash_attention.work import BLOCK_ROWS

BLOCK_KEYS = 64
LOG2_E = math.log2(math.e)


def refuse(call: AttentionCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_before_ampere(device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (16, 32, 64, 128):
        return f"takes head dimension 16, 32, 64 or 128, q has {dim}"
    return None


def _kernel(table, q_ref, *refs, lengths, scale, group, dim):
    ranges = len(lengths)
    k_refs, v_refs, (out_ref, lse_ref) = refs[:ranges], refs[ranges : 2 * ranges], refs[2 * ranges :]
    head, block, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_head = head // group
    start, first_stop, end, last_stop, row = (plt.load(table.at[batch, block, i]) for i in range(5))
    every = pl.ds(0, dim)
    q = plt.load(q_ref.at[batch, pl.ds(row, BLOCK_ROWS), head, every])
    stop = jnp.minimum(end, first_stop + jnp.arange(BLOCK_ROWS, dtype=jnp.int32))[:, None]

    def attend(tile, carry, base, first, length, k_ref, v_ref):
        acc, peak, total = carry
        key = first + tile * BLOCK_KEYS + jnp.arange(BLOCK_KEYS, dtype=jnp.int32)
        number = base + key
        read = (key < length) & (number >= start) & (number < last_stop)
        window = batch, pl.ds(first + tile * BLOCK_KEYS, BLOCK_KEYS), kv_head, every
        # Unread slots may hold NaN; as zeros they cannot pass it on.
        k, v = (plt.load(ref.at[window], mask=read[:, None], other=0.0) for ref in (k_ref, v_ref))
        scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * (scale * LOG2_E)
        scores = jnp.where(read[None, :] & (number[None, :] < stop), scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        p, decay = jnp.exp2(scores - shift[:, None]), jnp.exp2(peak - shift)
        update = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return acc * decay[:, None] + update, new_peak, total * decay + jnp.sum(p, axis=1)

    carry = (
        jnp.zeros((BLOCK_ROWS, dim), jnp.float32),
        jnp.full((BLOCK_ROWS,), -jnp.inf, jnp.float32),
        jnp.zeros((BLOCK_ROWS,), jnp.float32),
    )
    for number, length in enumerate(lengths):
        column = work.RANGE_COLUMNS + 4 * number
        first, tiles = plt.load(table.at[batch, block, column]), plt.load(table.at[batch, block, column + 3])
        step = functools.partial(
            attend, base=sum(lengths[:number]), first=first, length=length, k_ref=k_refs[number], v_ref=v_refs[number]
        )
        carry = lax.fori_loop(0, tiles, step, carry)
    acc, peak, total = carry
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.where(seen[:, None], acc / safe[:, None], 0.0).astype(out_ref.dtype)
    plt.store(out_ref.at[batch, pl.ds(row, BLOCK_ROWS), head, every], out)
    lse = jnp.where(seen, (peak + jnp.log2(safe)) / LOG2_E, -jnp.inf)
    plt.store(lse_ref.at[batch, head, pl.ds(row, BLOCK_ROWS)], lse)


def forward(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; not differentiable."""
    q = work.pad_segments(call.q, call.rows)
    batch, rows, heads, dim = q.shape
    table = work.work_table(call, BLOCK_KEYS)
    kernel = functools.partial(
        _kernel,
        lengths=tuple(key.shape[1] for key in call.k),
        scale=call.scale,
        group=heads // call.kv_heads,
        dim=dim,
    )
    out, lse = pl.pallas_call(
        kernel,
        out_shape=(array_type(q.shape, q.dtype, q), array_type((batch, heads, rows), jnp.float32, q)),
        grid=(heads, table.shape[1], batch),
        compiler_params=plt.CompilerParams(num_warps=8 if dim > 64 else 4, num_stages=2),
        name="flash_attention_rows",
    )(table, q, *call.k, *call.v)
    return work.unpad_segments(out, call.rows, 1), work.unpad_segments(lse, call.rows, 2)


def triton(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; the gradient recomputes through XLA."""
    return with_recomputed_gradient(forward, call)

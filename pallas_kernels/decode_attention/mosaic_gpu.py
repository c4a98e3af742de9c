"""Decoding for Hopper in Pallas Mosaic GPU: the cache is split over blocks of threads, partials are left to merge.

All query heads of a KV head and all rows go into the 64 rows of one wgmma, so every key and value is read
once. Each block of threads streams its part of the keys through shared memory; a small XLA program merges.
"""

import dataclasses
import functools
import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuned
from pallas_kernels.compat import array_type, load_smem, transpose_smem
from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.decode_attention.parts import Parts, packed
from pallas_kernels.device import Device, current, refuse_unless_hopper
from pallas_kernels.flash_attention import mosaic_gpu as prefill
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import RowSegment

TILE_ROWS = 64
MOST_PACKED_ROWS = 512  # beyond, the prefill kernel has enough rows to fill the chip
MULTIPROCESSORS = 132
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Keys a step (a multiple of 64), steps in shared memory, blocks of threads per multiprocessor."""

    block_keys: int = 128
    stages: int = 2
    blocks_per_multiprocessor: int = 1


def refuse(call: DecodeCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_unless_hopper(device):
        return reason
    if call.quantised:
        return f"reads caches of 16 bits, k has {call.k.dtype}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (64, 128):
        return f"takes head dimension 64 or 128, q has {dim}"
    return None


def _kernel(
    q_ref, k_ref, v_ref, lengths, offsets, layer, out_ref, lse_ref, scratch, *, config, scale, limits, group, causal
):
    """One block of threads: 64 packed rows of one KV head against one part of the keys."""
    (q_smem, k_smem, v_smem, out_smem, lse_smem), (q_ready, k_ready, v_ready), (k_free, v_free) = scratch
    block_keys, stages = config.block_keys, config.stages
    head, place, batch = (lax.axis_index(name) for name in ("heads", "places", "batch"))
    parts = lse_ref.shape[2]
    part, row_tile = lax.rem(place, jnp.int32(parts)), lax.div(place, jnp.int32(parts))
    me = lax.axis_index("groups")
    dim = q_smem.shape[-1]
    used_rows = out_smem.shape[0]

    length, offset = (jnp.clip(ref[batch], *both) for ref, both in zip((lengths, offsets), limits, strict=True))
    row = row_tile * TILE_ROWS
    if causal:  # the last packed row of this tile bounds the keys that any of its rows sees
        length = jnp.minimum(length, offset + lax.div(row + TILE_ROWS - 1, jnp.int32(group)) + 1)
    share = lax.div(jnp.maximum(length, 0) + parts * block_keys - 1, jnp.int32(parts * block_keys)) * block_keys
    first = part * share
    keys = jnp.clip(length - first, 0, share)
    steps = lax.div(keys + block_keys - 1, jnp.int32(block_keys))

    def stage(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(me == 0)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head, pl.ds(row, TILE_ROWS)], q_smem, q_ready)
        plgpu.barrier_wait(q_ready)

        def attend(step, carry, masked):
            acc, peak, total = carry
            slot = stage(step)
            plgpu.barrier_wait(k_ready.at[slot])

            def product(scores_ref):
                plgpu.wgmma(scores_ref, q_smem, transpose_smem(k_smem.at[slot]))
                return scores_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((TILE_ROWS, block_keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            left = keys - step * block_keys
            if masked:
                key_id = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                visible = key_id < left
                if causal:  # key - offset <= row // group, without the division
                    row_id = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                    ahead = (first + step * block_keys - offset) * group - row
                    visible &= key_id * group - row_id <= -ahead
                scores = jnp.where(visible, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=1) * (scale * LOG2_E))
            shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
            decay = jnp.exp2(peak - shift)
            p = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(shift, scores.shape, [0]))
            total = total * decay + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            p16 = p.astype(q_smem.dtype)
            plgpu.barrier_wait(v_ready.at[slot])
            if masked:

                @pl.when(left < block_keys)
                def _():  # slots beyond the length may hold NaN, which a weight of 0 would not stop
                    tile = v_smem.at[slot]
                    values = load_smem(tile, plgpu.Layout.WGMMA)
                    key_id = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                    tile[...] = jnp.where(key_id < left, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

            acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p16, v_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_peak, total

        per_row = plgpu.Layout.WGMMA.reduce(1)
        carry = (
            plgpu.layout_cast(jnp.zeros((TILE_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), per_row),
            plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), per_row),
        )
        first_stop = offset + lax.div(row, jnp.int32(group)) + 1
        all_see = jnp.clip(first_stop - first, 0, keys) if causal else keys
        unmasked = lax.div(all_see, jnp.int32(block_keys))
        carry = lax.fori_loop(0, unmasked, functools.partial(attend, masked=False), carry)
        acc, peak, total = lax.fori_loop(unmasked, steps, functools.partial(attend, masked=True), carry)
        inverse = jnp.where(total > 0, 1.0 / total, 0.0)
        out_smem[...] = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        lse_smem[...] = jnp.where(total > 0, (peak + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[batch, head, part, pl.ds(row, used_rows)])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, part, pl.ds(row, TILE_ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == 1)
    def _memory():
        plgpu.set_max_registers(24, action="decrease")
        entry = layer[0] * lengths.shape[0] + batch

        @pl.loop(0, steps)
        def _(step):
            slot = stage(step)
            window = entry, pl.ds(first + step * block_keys, block_keys), head
            for free, ref, tiles, ready in ((k_free, k_ref, k_smem, k_ready), (v_free, v_ref, v_smem, v_ready)):
                pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                plgpu.copy_gmem_to_smem(ref.at[window], tiles.at[slot], ready.at[slot])


def split(call: DecodeCall, config: Config) -> Parts:
    """Attention of packed rows, the keys split over the chip."""
    batch, rows, heads, dim = call.q.shape
    if call.keys % 8:  # the height of a shared-memory tile
        call = call.one_layer()
        k, v = (jnp.pad(a, ((0, 0), (0, -call.keys % 8), (0, 0), (0, 0))) for a in (call.k, call.v))
    else:  # layer and batch entry as one axis: copies into shared memory know at most five
        k, v = (a.reshape(-1, *a.shape[-3:]) for a in (call.k, call.v))
    layer = jnp.zeros((1,), jnp.int32) if call.layer is None else call.layer[None]
    keys, kv_heads = call.keys, call.kv_heads
    group = heads // kv_heads
    row_tiles = -(-rows * group // TILE_ROWS)
    missing = row_tiles * TILE_ROWS - rows * group
    q = jnp.pad(packed(call.q, kv_heads), ((0, 0), (0, 0), (0, missing), (0, 0)))
    wanted = MULTIPROCESSORS * config.blocks_per_multiprocessor // (batch * kv_heads * row_tiles)
    parts = max(1, min(wanted, -(-keys // config.block_keys)))
    causal = call.causal_offset is not None
    offset = call.causal_offset if causal else call.lengths

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    kv_scratch = plgpu.SMEM((config.stages, config.block_keys, dim), call.q.dtype, transforms=tiled)
    ready = plgpu.Barrier(num_barriers=config.stages)
    arrays = (
        plgpu.SMEM((TILE_ROWS, dim), call.q.dtype, transforms=tiled),
        kv_scratch,
        kv_scratch,
        plgpu.SMEM(
            (TILE_ROWS, dim),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        ),
        plgpu.SMEM((TILE_ROWS,), jnp.float32),
    )

    def entry(*refs):
        def body(*scratch):
            _kernel(*refs, scratch, config=config, scale=call.scale, limits=call.limits, group=group, causal=causal)

        pl.run_scoped(body, arrays, (plgpu.Barrier(), ready, ready), (ready, ready), collective_axes="groups")

    shape = batch, kv_heads, parts, row_tiles * TILE_ROWS
    out, lse = plgpu.kernel(
        entry,
        out_type=(array_type((*shape, dim), jnp.float32, call.q), array_type(shape, jnp.float32, call.q)),
        grid=(kv_heads, parts * row_tiles, batch),
        grid_names=("heads", "places", "batch"),
        num_threads=2,
        thread_name="groups",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(q, k, v, call.lengths, offset, layer)
    return Parts(out[:, :, :, : rows * group], lse[:, :, :, : rows * group], rows)


def mosaic_gpu(call: DecodeCall, config: Config | None = None) -> Parts:
    """Attention over parts of the keys, or over all of them where the rows are many."""
    rows, heads = call.q.shape[1:3]
    if rows * (heads // call.kv_heads) <= MOST_PACKED_ROWS:
        if config is None:
            config = Config(**tuned.parameters("decode_attention", call.q.shape[-1], current()))
        return split(call, config)
    call = call.one_layer().clipped()
    offset = call.keys if call.causal_offset is None else call.causal_offset
    segment = RowSegment(rows, start=0, offset=offset, end=call.lengths)
    out, lse = prefill.mosaic_gpu(AttentionCall(call.q, (call.k,), (call.v,), (segment,), call.scale))
    return Parts.whole(out.astype(jnp.float32), lse, call.kv_heads)

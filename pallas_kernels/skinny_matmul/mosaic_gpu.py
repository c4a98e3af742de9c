"""A few rows times matrices of a layer for Hopper in Pallas Mosaic GPU: bound by reading them once.

A block of threads owns 128 columns and one part of the depth: a memory warpgroup streams tiles of its matrix through
shared memory, a compute warpgroup multiplies them with the rows on the tensor cores (64 rows high; rows that do not
exist are not loaded, and what stands there reaches only rows of the result that are not stored). XLA adds the parts.
"""

import dataclasses
from itertools import accumulate

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import array_type
from pallas_kernels.device import Device, refuse_unless_hopper
from pallas_kernels.skinny_matmul.call import MatmulCall

TILE_ROWS = 64  # the height of one wgmma
TILE_COLUMNS = 64  # 128 bytes, the widest swizzle; copies begin at a multiple of it
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns of a block of threads, depth of a step, steps in shared memory, blocks of threads a multiprocessor."""

    block_columns: int = 128
    block_depth: int = 64
    stages: int = 4
    blocks_per_multiprocessor: int = 1
    registers: int = 232
    """Of a thread that computes."""
    parts: int | None = None
    """Into how many the depth is cut; None: as many as the blocks of threads that run at once allow."""


def refuse(call: MatmulCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_unless_hopper(device):
        return reason
    if call.fp8:
        return "multiplies matrices in the dtype of x, these are in e4m3"
    if call.x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, x has {call.x.dtype}"
    if call.x.shape[0] > TILE_ROWS:
        return f"takes up to {TILE_ROWS} rows, there are {call.x.shape[0]}"
    sizes = call.x.shape[1], *call.columns
    if any(size % TILE_COLUMNS for size in sizes):
        wrong = f"{sizes[0]} rows and {' and '.join(map(str, sizes[1:]))} columns"
        return f"needs matrices, or shares of them, whose sizes {TILE_COLUMNS} divides, not {wrong}"
    return None


def _kernel(x_ref, stack_refs, place, out_ref, scratch, *, config, columns):
    """One block of threads; ``columns``: of each stack's share."""
    (x_smem, w_smem, out_smem), (x_ready, w_ready), free = scratch
    tile, part = lax.axis_index("tiles"), lax.axis_index("parts")
    me = lax.axis_index("groups")
    rows, depth = x_ref.shape
    width, step_depth = config.block_columns, config.block_depth
    parts = out_ref.shape[0]
    all_steps = -(-depth // step_depth)
    share = -(-all_steps // parts)
    first = part * share
    steps = jnp.clip(all_steps - first, 0, share)

    def stage(step):
        return lax.rem(step, jnp.int32(config.stages))

    @pl.when(me == 0)
    def _compute():
        plgpu.set_max_registers(config.registers, action="increase")

        def products(acc_ref):
            @pl.loop(0, steps)
            def _(step):
                slot = stage(step)
                plgpu.barrier_wait(x_ready.at[slot])
                plgpu.barrier_wait(w_ready.at[slot])
                plgpu.wgmma(acc_ref, x_smem.at[slot], w_smem.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            return acc_ref[...]

        out_smem[...] = pl.run_scoped(products, plgpu.ACC((TILE_ROWS, width), jnp.float32))
        plgpu.commit_smem()
        window = part, pl.ds(0, rows), pl.ds(tile * width, width)
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_ref.at[window])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == 1)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        layer, row_share, column_share = (place[0], place[1], place[2]) if place.shape[0] > 1 else (place[0], 0, 0)
        first_tile = 0
        for stack_ref, own in zip(stack_refs, columns, strict=True):
            tiles = -(-own // width)

            @pl.when((tile >= first_tile) & (tile < first_tile + tiles))
            def _(stack_ref=stack_ref, own=own, first_tile=first_tile):
                column = column_share * own + (tile - first_tile) * width

                @pl.loop(0, steps)
                def _(step):
                    slot = stage(step)
                    pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    here = (first + step) * step_depth
                    window = layer, pl.ds(row_share * depth + here, step_depth), pl.ds(column, width)
                    plgpu.copy_gmem_to_smem(stack_ref.at[window], w_smem.at[slot], w_ready.at[slot])
                    window = pl.ds(0, rows), pl.ds(here, step_depth)
                    plgpu.copy_gmem_to_smem(x_ref.at[window], x_smem.at[slot, pl.ds(0, rows)], x_ready.at[slot])

            first_tile += tiles


def mosaic_gpu(call: MatmulCall, config: Config | None = None) -> tuple[jax.Array, ...]:
    """For each stack float32 [R, columns]."""
    config = config or Config()
    rows, depth = call.x.shape
    x = jnp.pad(call.x, ((0, -rows % 8), (0, 0)))
    tiles = [-(-own // config.block_columns) for own in call.columns]
    steps = -(-depth // config.block_depth)
    wanted = MULTIPROCESSORS * config.blocks_per_multiprocessor // sum(tiles)
    parts = config.parts or max(1, min(wanted, steps // config.stages))
    tiled = (plgpu.TilingTransform((8, 128 // x.dtype.itemsize)), plgpu.SwizzleTransform(128))
    tiled32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    arrays = (
        plgpu.SMEM((config.stages, TILE_ROWS, config.block_depth), x.dtype, transforms=tiled),
        plgpu.SMEM((config.stages, config.block_depth, config.block_columns), x.dtype, transforms=tiled),
        plgpu.SMEM((TILE_ROWS, config.block_columns), jnp.float32, transforms=tiled32),
    )
    barriers = plgpu.Barrier(num_barriers=config.stages)

    def entry(x_ref, *refs):
        *stack_refs, place, out_ref = refs

        def body(*scratch):
            _kernel(x_ref, stack_refs, place, out_ref, scratch, config=config, columns=call.columns)

        pl.run_scoped(body, arrays, (barriers, barriers), barriers, collective_axes="groups")

    partial = plgpu.kernel(
        entry,
        out_type=array_type((parts, x.shape[0], sum(tiles) * config.block_columns), jnp.float32, x),
        grid=(sum(tiles), parts),
        grid_names=("tiles", "parts"),
        num_threads=2,
        thread_name="groups",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, *call.stacks, call.place)
    starts = [first * config.block_columns for first in accumulate(tiles, initial=0)]
    return tuple(
        partial[:, :rows, start : start + own].sum(axis=0) for start, own in zip(starts, call.columns, strict=False)
    )

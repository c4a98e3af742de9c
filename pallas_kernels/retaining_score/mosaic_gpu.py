"""The retaining head for Hopper in Pallas Mosaic GPU: both products in one kernel.

One block of threads computes 128 rows by 256 columns of x @ w1, applies silu in registers and multiplies by
its 256 rows of w2 at once: the [S, F] intermediate never leaves the chip. The partial scores of the F / 256
column blocks are added, pooled and masked by XLA.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import array_type
from pallas_kernels.device import Device, refuse_unless_hopper
from pallas_kernels.retaining_score.call import ScoreCall, pool_and_mask

COMPUTE_GROUPS = 2
GROUP_ROWS = 64
BLOCK_ROWS = COMPUTE_GROUPS * GROUP_ROWS
BLOCK_COLUMNS = 256
STEP = 64  # depth of one step of x @ w1: 128 bytes, the widest swizzle
MOST_HEADS = 32  # w2 is padded to this many columns


@dataclasses.dataclass(frozen=True)
class Config:
    """Steps in shared memory."""

    stages: int = 3


def refuse(call: ScoreCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if reason := refuse_unless_hopper(device):
        return reason
    if call.w1 is None:
        return "computes both products; the folded form has only the second"
    if call.data.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, x has {call.data.dtype}"
    width, hidden = call.w1.shape
    if width % STEP or hidden % BLOCK_COLUMNS:
        return f"needs a width that {STEP} divides and a hidden size that {BLOCK_COLUMNS} divides, not {call.w1.shape}"
    if call.w2.shape[1] > MOST_HEADS:
        return f"takes up to {MOST_HEADS} KV heads, w2 has {call.w2.shape[1]}"
    return None


def _silu(x):
    return x / (1.0 + jnp.exp(-x))


def _kernel(x_ref, w1_ref, w2_ref, out_ref, scratch, *, config):
    (x_smem, w1_smem, w2_smem, out_smem), (x_ready, w1_ready, w2_ready), free = scratch
    column, block, batch = (lax.axis_index(name) for name in ("columns", "blocks", "batch"))
    me = lax.axis_index("groups")
    steps = x_ref.shape[2] // STEP
    stages = config.stages
    row = block * BLOCK_ROWS

    def stage(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(me < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def hidden(acc_ref):
            @pl.loop(0, steps)
            def _(step):
                slot = stage(step)
                plgpu.barrier_wait(x_ready.at[slot])
                plgpu.barrier_wait(w1_ready.at[slot])
                mine = x_smem.at[slot, pl.ds(me * GROUP_ROWS, GROUP_ROWS)]
                plgpu.wgmma(acc_ref, mine, w1_smem.at[slot])
                plgpu.wgmma_wait(1)  # the product of the step before is done: its stage may be refilled
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[stage(step + stages - 1)]))

            return acc_ref[...]

        acc = pl.run_scoped(hidden, plgpu.ACC((GROUP_ROWS, BLOCK_COLUMNS), jnp.float32))
        activated = _silu(acc).astype(x_smem.dtype)
        plgpu.barrier_wait(w2_ready)

        def scores(acc_ref):
            plgpu.wgmma(acc_ref, activated, w2_smem)
            return acc_ref[...]

        partial = pl.run_scoped(scores, plgpu.ACC((GROUP_ROWS, MOST_HEADS), jnp.float32))
        mine = out_smem.at[me]
        mine[...] = partial
        plgpu.commit_smem()
        rows = pl.ds(row + me * GROUP_ROWS, GROUP_ROWS)
        plgpu.copy_smem_to_gmem(mine, out_ref.at[batch, column, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == COMPUTE_GROUPS)
    def _memory():
        plgpu.set_max_registers(40, action="decrease")
        first_column = pl.ds(column * BLOCK_COLUMNS, BLOCK_COLUMNS)
        plgpu.copy_gmem_to_smem(w2_ref.at[first_column], w2_smem, w2_ready)

        @pl.loop(0, steps)
        def _(step):
            slot = stage(step)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            depth = pl.ds(step * STEP, STEP)
            plgpu.copy_gmem_to_smem(x_ref.at[batch, pl.ds(row, BLOCK_ROWS), depth], x_smem.at[slot], x_ready.at[slot])
            plgpu.copy_gmem_to_smem(w1_ref.at[depth, first_column], w1_smem.at[slot], w1_ready.at[slot])


def mosaic_gpu(call: ScoreCall, config: Config | None = None) -> jax.Array:
    """Scores float32 [B, S, K]."""
    config = config or Config()
    batch, rows, heads = call.shape
    assert call.w1 is not None, "refused before"
    columns = call.w1.shape[1] // BLOCK_COLUMNS
    x = jnp.pad(call.data, ((0, 0), (0, -rows % 8), (0, 0))) if rows % 8 else call.data
    blocks = -(-rows // BLOCK_ROWS)
    w2 = jnp.pad(call.w2, ((0, 0), (0, MOST_HEADS - heads)))
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tiled32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    arrays = (
        plgpu.SMEM((config.stages, BLOCK_ROWS, STEP), x.dtype, transforms=tiled),
        plgpu.SMEM((config.stages, STEP, BLOCK_COLUMNS), x.dtype, transforms=tiled),
        plgpu.SMEM(
            (BLOCK_COLUMNS, MOST_HEADS),
            x.dtype,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64)),
        ),
        plgpu.SMEM((COMPUTE_GROUPS, GROUP_ROWS, MOST_HEADS), jnp.float32, transforms=tiled32),
    )
    ready = plgpu.Barrier(num_barriers=config.stages)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: _kernel(*refs, scratch, config=config),
            arrays,
            (ready, ready, plgpu.Barrier()),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=config.stages),
            collective_axes="groups",
        )

    partial = plgpu.kernel(
        entry,
        out_type=array_type((batch, columns, blocks * BLOCK_ROWS, MOST_HEADS), jnp.float32, x),
        grid=(columns, blocks, batch),
        grid_names=("columns", "blocks", "batch"),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="groups",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, call.w1, w2)
    return pool_and_mask(partial[:, :, :rows, :heads].sum(axis=1), **call.marks)

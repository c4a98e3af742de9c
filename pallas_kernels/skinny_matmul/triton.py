"""A few rows times e4m3 matrices of a layer in the Triton language, bound by reading those: Hopper and Ada.

The rows stay in 16 bits. Rounding them, too, would cost a pass of their own for every product (a launch for the largest
value, one for the rounding), and a product that waits for memory is no faster for it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.device import Device, refuse_before_ada
from pallas_kernels.skinny_matmul.call import MatmulCall

MOST_ROWS = 64
MOST_STACKS = 3
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns of a block of threads, depth of a step, steps in flight, warps; blocks of threads that are wanted."""

    columns: int = 128
    depth: int = 128
    stages: int = 3
    warps: int = 4
    blocks_per_multiprocessor: int = 2


def refuse(call: MatmulCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if not call.fp8:
        return f"multiplies matrices in e4m3, these have {call.stacks[0].dtype}"
    if reason := refuse_before_ada(device) or triton_launch.refuse(device):
        return reason
    if call.x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, x has {call.x.dtype}"
    if not 2 <= call.x.shape[0] <= MOST_ROWS:
        return f"takes 2 to {MOST_ROWS} rows (one row XLA's reduction reads faster), there are {call.x.shape[0]}"
    if len(call.stacks) > MOST_STACKS:
        return f"takes up to {MOST_STACKS} stacks, there are {len(call.stacks)}"
    return None


def triton(call: MatmulCall, config: Config | None = None) -> tuple[jax.Array, ...]:
    """For each stack float32 [R, columns]."""
    from pallas_kernels.skinny_matmul.triton_kernel import skinny_e4m3

    rows, depth = call.x.shape
    config = config or Config()
    own = call.columns
    tiles = [-(-columns // config.columns) for columns in own]
    wanted = MULTIPROCESSORS * config.blocks_per_multiprocessor // sum(tiles)
    parts = max(1, min(wanted, depth // (config.depth * config.stages)))
    spare = MOST_STACKS - len(own)
    launch = triton_launch.Launch(
        name="skinny_e4m3",
        kernel=skinny_e4m3,
        blocks=(sum(tiles), parts),
        outputs=(((parts, rows, sum(tiles) * config.columns), jnp.float32),),
        num_warps=config.warps,
        num_stages=config.stages,
        constants={
            "ROWS": rows,
            "DEPTH": depth,
            "ROW_SHARES": call.row_shares,
            "COLUMN_SHARES": call.column_shares,
            **{f"OWN_{i}": columns for i, columns in enumerate((*own, *(0,) * spare))},
            **{f"TILES_{i}": count for i, count in enumerate((*tiles, 0)[:2])},
            "COLUMNS": sum(tiles) * config.columns,
            "PARTS": parts,
            "BLOCK": config.columns,
            "STEP": config.depth,
            "TILE": max(16, 1 << (rows - 1).bit_length()),
            "CUT": call.cut,
        },
    )
    stacks = (*call.stacks, *call.stacks[-1:] * spare)
    (out,) = triton_launch.call(launch, call.x[None], *(stack[None] for stack in stacks), call.place[None])
    starts = [sum(tiles[:i]) * config.columns for i in range(len(tiles))]
    return tuple(out[0, :, :, start : start + columns].sum(axis=0) for start, columns in zip(starts, own, strict=True))

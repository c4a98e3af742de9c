"""Every GPU kernel lowers for CUDA on a machine without GPU: a kernel that no longer lowers fails here.

Mosaic's lowering stops before ptxas: it proves neither that the machine code is right nor that it fits the chip.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CASES, LONG_CASES, apb_case

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.device import HOPPER, assume
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import work as flash_work
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.skinny_matmul import skinny_matmul

lowered_only = pytest.mark.lowered_only


def lower(run, *args) -> str:
    """The text of ``run`` lowered for CUDA, with kernels chosen as on a Hopper GPU."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with assume(HOPPER):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def flash_inputs(case, dtype=jnp.bfloat16):
    def array(length, heads):
        return jax.ShapeDtypeStruct((case.batch, length, heads, case.dim), dtype)

    kv = tuple(array(length, case.kv_heads) for length in case.ranges)
    return array(case.rows, case.heads), kv, kv


@lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("case", [*CASES[::2], *LONG_CASES], ids=lambda case: case.name)
def test_flash_attention(case):
    run = functools.partial(flash_attention, implementation="mosaic_gpu")
    assert "mosaic_gpu" in lower(run, *flash_inputs(case), case.row_segments(True))


@lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_flash_attention_types_and_dimensions(dtype, dim):
    case = apb_case(3, anchor=256, passing=128, block=512, dim=dim)
    run = functools.partial(flash_attention, implementation="mosaic_gpu")
    assert "mosaic_gpu" in lower(run, *flash_inputs(case, dtype), case.row_segments(True))


@pytest.mark.parametrize("check_vma", [False, True])
def test_flash_attention_in_shard_map(check_vma):
    case = apb_case(3, anchor=128, passing=128, block=128)
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    run = functools.partial(flash_attention, implementation="mosaic_gpu")
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec(None), check_vma=check_vma
    )
    assert "mosaic_gpu" in lower(sharded, *flash_inputs(case), case.row_segments(True))


@lowered_only
@pytest.mark.kernel
def test_flash_attention_gradient_in_a_scan():
    case = apb_case(3, anchor=128, passing=128, block=128)

    def loss(q, k, v, rows):
        def layer(carry, _):
            out, lse = flash_attention(carry, k, v, rows, implementation="mosaic_gpu")
            return out, lse.max()

        out, peaks = jax.lax.scan(layer, q, None, length=2)
        return out.astype(jnp.float32).sum() + peaks.sum()

    assert "mosaic_gpu" in lower(jax.grad(loss), *flash_inputs(case), case.row_segments(True))


@lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("dim", [64, 128])
def test_decode_attention(dim, rows, causal):
    def run(q, k, v, lengths):
        offset = lengths - 7 if causal else None
        return decode_attention(q, k, v, lengths, offset, implementation="mosaic_gpu")

    q, kv = (jax.ShapeDtypeStruct((2, n, h, dim), jnp.bfloat16) for n, h in ((rows, 8), (1003, 2)))
    assert "mosaic_gpu" in lower(run, q, kv, kv, jax.ShapeDtypeStruct((2,), jnp.int32))


@lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("slots", [1000, 1003])
def test_decode_attention_of_a_stack(slots):
    """Slots that 8 does not divide are copied first, whatever the layer."""

    def run(q, k, v, lengths, layer):
        return decode_attention(q, k, v, lengths, layer=layer, implementation="mosaic_gpu")

    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 8, 64), (3, 2, slots, 2, 64)))
    text = lower(run, q, kv, kv, jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
    assert "mosaic_gpu" in text
    assert ("stablehlo.dynamic_slice" in text) == (slots % 8 > 0)


@lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("rows", "depth", "widths"), [(1, 4096, (1024, 256)), (3, 192, (64,)), (64, 256, (640,))])
def test_skinny_matmul(rows, depth, widths, dtype):
    def run(x, stacks, layer):
        return skinny_matmul(x, stacks, layer, column_share=(layer, 1), implementation="mosaic_gpu")

    x, *stacks = (jax.ShapeDtypeStruct(s, dtype) for s in ((rows, depth), *((2, depth, n) for n in widths)))
    text = lower(run, x, stacks, jax.ShapeDtypeStruct((), jnp.int32))
    assert "mosaic_gpu" in text
    assert "stablehlo.dynamic_slice" not in text


@lowered_only
@pytest.mark.kernel
def test_triton_kernels_compile_to_machine_code():
    """For compute capability 8.0, 8.9 and 9.0, ptxas included, in a process without Triton's interpreter."""
    pytest.importorskip("triton", reason="compiles with Triton, which is not installed")
    script = Path(__file__).with_name("triton_ptx.py")
    where = {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, str(script), "80", "89", "90"],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    every = {"flash_attention_rows", "block_sparse_attention", "decode_8bit"}
    for capability, target, shared in ((80, "sm_80", 99), (89, "sm_89", 99), (90, "sm_90a", 227)):
        mine = [kernel for kernel in kernels if kernel["capability"] == capability]
        assert {kernel["kernel"] for kernel in mine} == every | ({"skinny_e4m3"} if capability >= 89 else set())
        for kernel in mine:
            assert target in kernel["target"]
            assert kernel["machine_code_bytes"] > 0
            # 8.0 stands for 8.6 too; its blocks and those of 8.9 have the least shared memory.
            assert kernel["shared_bytes"] <= shared * 1024, kernel


def test_the_heaviest_blocks_of_rows_come_first():
    case = apb_case(7, anchor=256, passing=128, block=512)
    q, k, v = flash_inputs(case)
    call = AttentionCall(q, k, v, case.row_segments(False), 1.0)
    order = flash_work.block_order(call)
    assert order[0] == (1, 384, 640)
    assert order[-1] == (0, 0, 0)

"""Every GPU kernel lowers for CUDA on a machine without GPU: a kernel that no longer lowers fails here.

Lowering stops before ptxas: it proves neither that the machine code is right nor that it fits the chip.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CASES, LONG_CASES, apb_case

from pallas_kernels.block_sparse_attention import KeyTiles, block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.device import HOPPER, assume
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import work as flash_work
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.retaining_score import retaining_score
from pallas_kernels.select import select_topk
from pallas_kernels.skinny_matmul import skinny_matmul

lowered_only = pytest.mark.lowered_only
triton_is_deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def lower(run, *args) -> str:
    """The text of ``run`` lowered for CUDA, with kernels chosen as on a Hopper GPU."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    with assume(HOPPER):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def lower_triton(run, *args) -> str:
    """As `lower`; newer JAX versions want to know the GPU while they lower Pallas Triton."""
    if jax.__version_info__ < (0, 11):
        return lower(run, *args)
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)):
        return lower(run, *args)


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
@pytest.mark.parametrize("rows", [300, 512])
def test_retaining_score(rows):
    def run(x, w1, w2, marks):
        return retaining_score(
            x, w1, w2, dead_rows=marks[0], masked_rows=marks[1], valid_rows=marks[2], implementation="mosaic_gpu"
        )

    shapes = (1, rows, 512), (512, 256), (256, 8)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    assert "mosaic_gpu" in lower(run, *arrays, jax.ShapeDtypeStruct((3,), jnp.int32))


@lowered_only
@pytest.mark.kernel
@triton_is_deprecated
def test_select():
    def run(scores, k, v):
        return select_topk(scores, k, v, 100, implementation="triton")

    kv = jax.ShapeDtypeStruct((1, 300, 8, 128), jnp.bfloat16)
    assert "triton" in lower_triton(run, jax.ShapeDtypeStruct((1, 300, 8), jnp.float32), kv, kv)


@lowered_only
@pytest.mark.kernel
@triton_is_deprecated
@pytest.mark.parametrize(("block_q", "block_k", "columns"), [(64, 64, True), (128, 128, False)])
def test_block_sparse_attention_triton(block_q, block_k, columns):
    def run(q, k, v, *tiles):
        return block_sparse_attention(
            q, k, v, KeyTiles(*tiles), block_q=block_q, block_k=block_k, implementation="triton"
        )

    q, kv = (jax.ShapeDtypeStruct((1, 1000, heads, 128), jnp.bfloat16) for heads in (8, 2))
    lead = (1, 8, -(-1000 // block_q))
    entries, counts = jax.ShapeDtypeStruct((*lead, 9), jnp.int32), jax.ShapeDtypeStruct(lead, jnp.int32)
    assert "triton" in lower_triton(run, q, kv, kv, *((entries, counts) * (1 + columns)))


@lowered_only
@pytest.mark.kernel
@triton_is_deprecated
@pytest.mark.parametrize("case", [CASES[1], CASES[13], apb_case(3)], ids=lambda case: case.name)
def test_flash_attention_triton(case):
    run = functools.partial(flash_attention, implementation="triton")
    assert "triton" in lower_triton(run, *flash_inputs(case), case.row_segments(True))


def test_the_heaviest_blocks_of_rows_come_first():
    case = apb_case(7, anchor=256, passing=128, block=512)
    q, k, v = flash_inputs(case)
    call = AttentionCall(q, k, v, case.row_segments(False), 1.0)
    order = flash_work.block_order(call)
    assert order[0] == (1, 384, 640)
    assert order[-1] == (0, 0, 0)

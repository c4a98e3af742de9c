import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, LONG_CASES, Case, apb_case, check, error, exact, make_inputs
from jax.sharding import PartitionSpec

from pallas_kernels import KernelInputError, Unsupported
from pallas_kernels.device import HOPPER, assume
from pallas_kernels.flash_attention import RowSegment, flash_attention, xla_chunked
from pallas_kernels.flash_attention.call import make_call
from pallas_kernels.flash_attention.recompute import with_recomputed_gradient
from pallas_kernels.flash_attention.reference import reference
from pallas_kernels.flash_attention.work import RANGE_COLUMNS, work_table

PORTABLE = ("reference", "xla_chunked")


def named(implementation, dynamic):
    def attend(q, k, v, case):
        run = jax.jit(functools.partial(flash_attention, implementation=implementation))
        return run(q, k, v, case.row_segments(dynamic))

    return attend


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case):
    check(case, jnp.bfloat16, named("xla_chunked", dynamic=True))


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES[1::3], ids=lambda case: case.name)
def test_parity_of_the_reference(case):
    check(case, jnp.bfloat16, named("reference", dynamic=False))


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_parity_of_other_types_and_small_heads(dtype, implementation):
    check(apb_case(2, shards=4, dim=16), dtype, named(implementation, dynamic=False))


@pytest.mark.kernel
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_several_tiles(case, monkeypatch):
    monkeypatch.setattr("pallas_kernels.flash_attention.xla_chunked.TILE_ROWS", 64)
    monkeypatch.setattr("pallas_kernels.flash_attention.xla_chunked.TILE_KEYS", 96)
    check(case, jnp.bfloat16, named("xla_chunked", dynamic=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "run time"])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_bounds_at_the_edge_of_32_bits(implementation, dynamic):
    """Offsets that hide nothing or everything do not overflow where row numbers are added to them."""
    most, least = 2**31 - 1, -(2**31)

    def run(segment):
        bounds = (jnp.int32(b) if dynamic else b for b in segment[1:])
        return flash_attention(q, k, v, (RowSegment(segment[0], *bounds),), implementation=implementation)

    case = Case("edge", ((9, 3, 1000, 20),), (20,))
    q, k, v = make_inputs(case, jnp.float32)
    for got, want in zip(run((9, 3, most, 20)), exact(case, q, k, v), strict=True):
        assert error(got, want) < 1e-5
    for start, offset in ((0, least), (most, 5)):
        out, lse = run((9, start, offset, 20))
        assert not out.any()
        assert jnp.isneginf(lse).all()


@pytest.mark.parametrize(("offset", "tiles"), [(2**31 - 1, 1), (-(2**31), 0)])
def test_work_of_the_gpu_kernels_at_the_edge_of_32_bits(offset, tiles):
    q, kv = jnp.zeros((1, 300, 1, 16)), (jnp.zeros((1, 20, 1, 16)),)
    table = work_table(make_call(q, kv, kv, (RowSegment(300, 0, jnp.int32(offset), 20),), None), 64)
    assert (table[..., RANGE_COLUMNS + 3] == tiles).all()
    assert (jnp.abs(table) < 1000).all()


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_one_program_serves_all_shards(implementation, check_vma):
    """axis_index decides the bounds inside shard_map, under jit and a scan over layers."""
    cases = [apb_case(shard) for shard in range(8)]
    inputs = [make_inputs(case, jnp.float32, seed=3) for case in cases]
    q = jnp.stack([q for q, _, _ in inputs])
    k, v = (tuple(map(jnp.stack, zip(*(i[n] for i in inputs), strict=True))) for n in (1, 2))
    total, anchor, block = cases[0].ranges

    def local(q, k, v):
        shard = jax.lax.axis_index("sp")
        dead = shard == 0
        rows = (
            RowSegment(anchor, total, total, jnp.where(dead, total, total + anchor)),
            RowSegment(
                block,
                jnp.where(dead, total + anchor, total - 16 * shard),
                total + anchor,
                total + anchor + block,
            ),
        )
        k, v = (tuple(a[0] for a in ranges) for ranges in (k, v))

        def layer(carry, _):
            return carry, flash_attention(q[0], k, v, rows, implementation=implementation)

        _, (out, lse) = jax.lax.scan(layer, None, None, length=2)
        return out[1][None], lse[1][None]

    mesh = jax.make_mesh((8,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("sp")
    run = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma)
    out, lse = jax.jit(run)(q, k, v)
    for shard, case in enumerate(cases):
        want = flash_attention(
            q[shard],
            tuple(a[shard] for a in k),
            tuple(a[shard] for a in v),
            case.row_segments(False),
            implementation="reference",
        )
        assert error(out[shard], want[0]) < 1e-6
        assert error(lse[shard], want[1]) < 1e-6


def test_gradients_agree_with_the_reference(monkeypatch):
    monkeypatch.setattr(xla_chunked, "TILE_ROWS", 16)
    monkeypatch.setattr(xla_chunked, "TILE_KEYS", 24)
    case = Case("causal", ((50, 0, 0, 50),), (50,), dim=16)
    q, k, v = make_inputs(case, jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape, np.float32))

    def loss(implementation, q, k, v):
        out, lse = flash_attention(q, k, v, case.row_segments(False), implementation=implementation)
        return (out * weight).sum() + (lse**2).sum()

    got, want = (jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2)))(q, k, v) for name in PORTABLE)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("loss_of", ["out", "lse", "both"])
def test_a_forward_kernel_gets_the_recomputed_gradient(loss_of):
    case = apb_case(2, shards=4, dim=16)
    q, k, v = make_inputs(case, jnp.float32)

    def loss(attend, q, k, v, rows):
        out, lse = attend(make_call(q, k, v, rows, None))
        return {"out": (out**2).sum(), "lse": (lse**2).sum(), "both": (out**2).sum() + (lse**2).sum()}[loss_of]

    def kernel(call):
        return with_recomputed_gradient(reference, call)

    rows = case.row_segments(True)
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2)))(q, k, v, rows) for attend in (kernel, reference)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(a, b) < 1e-5


def test_gradients_stay_finite_beside_unread_nan():
    case = apb_case(1, shards=4, dim=16)
    q, k, v = make_inputs(case, jnp.float32)

    def loss(q, k, v):
        return flash_attention(q, k, v, case.row_segments(True), implementation="xla_chunked")[0].sum()

    for gradient in jax.tree.leaves(jax.grad(loss, (0, 1, 2))(q, k, v)):
        assert np.isfinite(gradient).all()


def test_memory_is_linear_in_length():
    def peak(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        rows = (RowSegment(length, 0, 0, length),)
        run = jax.jit(lambda q, k, v: flash_attention(q, (k,), (v,), rows, implementation="xla_chunked"))
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert peak(32768) < 2.5 * peak(16384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (RowSegment(7, 0, 0, 8),)}, "row segments hold 7 rows, q has 8"),
        ({"rows": (RowSegment(8, 0, 0, 9),)}, "ends at key 9; there are 8"),
        ({"k": ()}, "0 key and 1 value ranges"),
        ({"v": (jnp.zeros((1, 8, 2, 8)),)}, "must both be"),
        ({"q": jnp.zeros((1, 8, 3, 16))}, "2 KV heads do not divide 3"),
        ({"q": jnp.zeros((1, 8, 4, 16), jnp.bfloat16)}, "dtypes bfloat16, float32, float32"),
        ({"implementation": "fastest"}, "no implementation 'fastest'"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, message):
    kv = jnp.zeros((1, 8, 2, 16))
    call = {"q": jnp.zeros((1, 8, 4, 16)), "k": (kv,), "v": (kv,), "rows": (RowSegment(8, 0, 0, 8),)}
    with pytest.raises(KernelInputError, match=message):
        flash_attention(**(call | change))


def test_a_named_implementation_never_falls_back():
    kv = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    q, rows = jnp.zeros((1, 8, 4, 16), jnp.bfloat16), (RowSegment(8, 0, 0, 8),)
    with pytest.raises(Unsupported, match="cudnn needs an NVIDIA GPU"):
        flash_attention(q, (kv,), (kv,), rows, implementation="cudnn")
    run_time = (RowSegment(8, 0, jnp.int32(0), 8),)
    with assume(HOPPER), pytest.raises(Unsupported, match="offset as an int"):
        flash_attention(q, (kv,), (kv,), run_time, implementation="cudnn")

"""The kernels in the Triton language through Triton's interpreter: what they compute, and that they stay in bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from attention_cases import Case, apb_case, check, error, exact, make_inputs, random_tiles

from apb_jax.kv_codes import CODES, quantise
from pallas_kernels import triton_launch
from pallas_kernels.block_sparse_attention import Blocks, block_sparse_attention
from pallas_kernels.block_sparse_attention import triton as block_sparse_triton
from pallas_kernels.block_sparse_attention.call import make_call as block_sparse_call
from pallas_kernels.decode_attention import Codes, decode_attention
from pallas_kernels.decode_attention import triton as decode_triton
from pallas_kernels.decode_attention.call import make_call as decode_call
from pallas_kernels.decode_attention.reference import reference
from pallas_kernels.flash_attention import RowSegment
from pallas_kernels.flash_attention import triton as flash_triton
from pallas_kernels.flash_attention.call import make_call
from pallas_kernels.float8 import FP8
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.skinny_matmul import triton as skinny_triton
from pallas_kernels.skinny_matmul.call import make_call as skinny_call

pytest.importorskip("triton", reason="the Triton kernels run in Triton's interpreter, and triton is not installed")
pytestmark = pytest.mark.skipif(jax.default_backend() == "gpu", reason="on a GPU the kernels run on it")

CASES = (
    Case("causal, odd length", ((77, 0, 0, 77),), (77,), heads=2, kv_heads=1, dim=16),
    Case("causal, several tiles", ((300, 0, 0, 300),), (300,), heads=1, kv_heads=1, dim=16),
    Case("lengths and starts", ((5, [0, 33, 60], 1000, [90, 60, 60]),), (90,), batch=3, heads=1, kv_heads=1, dim=16),
    Case("segments", ((20, 0, 0, 90), (7, 40, 100, 60), (33, 30, 57, 90)), (30, 27, 33), heads=2, kv_heads=1, dim=16),
    *(apb_case(shard, shards=4, heads=2, kv_heads=1, dim=16) for shard in range(4)),
    apb_case(2, shards=4, anchor=130, passing=70, block=150, heads=1, kv_heads=1, dim=16),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """TRITON_INTERPRET is set in tests/conftest.py: kernels look for it when they are first imported."""
    monkeypatch.setattr(triton_launch, "run", triton_interpreter.run)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_attention(case):
    def attend(q, k, v, case):
        return flash_triton.forward(make_call(q, k, v, case.row_segments(True), None))

    check(case, jnp.float16, attend)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rows", "keys", "block_q", "block_k", "aligned", "columns"),
    [(43, 61, 16, 16, True, False), (43, 61, 16, 16, False, True), (70, 140, 32, 128, True, False)],
)
def test_block_sparse(rows, keys, block_q, block_k, aligned, columns):
    rng = np.random.default_rng(2)
    tiles = random_tiles(rng, 4, rows, keys, block_q, block_k, aligned, columns)
    q = jnp.asarray(rng.standard_normal((1, rows, 4, 16)), jnp.float16)
    k, v = (jnp.asarray(rng.standard_normal((1, keys, 2, 16)), jnp.float16) for _ in range(2))
    blocks = Blocks(block_q, block_k)
    out, lse = block_sparse_triton.triton(block_sparse_call(q, k, v, tiles, blocks, keys - rows, None))
    shape = {"blocks": blocks, "causal_offset": keys - rows}
    want, plain = (
        block_sparse_attention(*(a.astype(dtype) for a in (q, k, v)), tiles, **shape, implementation=name)
        for dtype, name in ((jnp.float32, "reference"), (jnp.float16, "xla"))
    )
    assert error(out, want[0]) <= 2 * max(error(plain[0], want[0]), 2**-11)
    assert error(lse, want[1]) <= 1e-5


@pytest.mark.kernel
@pytest.mark.parametrize(("kind", "rows", "causal"), [("fp8", 1, False), ("fp8", 40, True), ("int8", 3, True)], ids=str)
def test_decode_8bit(kind, rows, causal):
    """A layer of a stack, rows that see nothing, NaN scales behind the lengths; against the values of the codes."""
    rng = np.random.default_rng(6)
    q = jnp.asarray(rng.standard_normal((2, rows, 4, 16)) * 50, jnp.float16)
    stacks = [jnp.asarray(rng.standard_normal((3, 2, 150, 2, 16)), jnp.float32) for _ in range(2)]
    (k, k_scale), (v, v_scale) = (quantise(a.at[..., 7, :, 3].set(1e4), CODES[kind]) for a in stacks)
    lengths, layer = jnp.asarray([150, 61]), jnp.int32(2)
    offset = jnp.asarray([150 - rows, -2]) if causal else None
    behind = jnp.arange(150)[:, None] >= lengths[None, :, None, None]
    spoiled = [jnp.where(behind, jnp.nan, s) for s in (k_scale, v_scale)]
    hostile = (Codes(a, s) for a, s in zip((k, v), spoiled, strict=True))
    out, lse = decode_triton.triton(decode_call(q, *hostile, lengths, offset, 0.002, layer)).merged()
    named = {"layer": layer, "scale": 0.002, "implementation": "reference"}
    want, want_lse = decode_attention(q, Codes(k, k_scale), Codes(v, v_scale), lengths, offset, **named)
    assert error(out, want) <= 1e-3
    assert error(lse, want_lse) <= 1e-4


def test_mapped_decoding_reads_its_own_stack():
    """Under vmap, as methods with a decode rule of their own have it on virtual shards."""
    rng = np.random.default_rng(7)
    q = jnp.asarray(rng.standard_normal((3, 2, 1, 4, 16)), jnp.float16)
    stacks = [jnp.asarray(rng.standard_normal((3, 2, 2, 40, 2, 16)), jnp.float32) for _ in range(2)]
    k, v = (Codes(*quantise(a, CODES["fp8"])) for a in stacks)
    lengths, layer = jnp.asarray([[40, 3], [7, 0], [25, 40]]), jnp.asarray([0, 1, 1])

    def shard(q, k, v, lengths, layer):
        return decode_triton.triton(decode_call(q, k, v, lengths, None, None, layer)).merged()

    arrays = q, k, v, lengths, layer
    got = jax.vmap(shard)(*arrays)
    for at in range(3):
        own, keys, values, length, number = jax.tree.map(lambda a: a[at], arrays)  # noqa: B023
        want = decode_attention(own, keys, values, length, layer=number, implementation="reference")
        assert error(got[0][at], want[0]) <= 1e-3
        assert error(got[1][at], want[1]) <= 1e-4


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("share", ["none", "rows", "columns"])
def test_skinny_products_of_e4m3_matrices(rows, share):
    """Up to three widths that no tile divides, a depth cut into parts with a rest, the last of two layers."""
    rng = np.random.default_rng(8)
    depth, widths = 1088, (72, 20, 8)
    x = jnp.asarray(rng.standard_normal((rows, depth)), jnp.float16)
    inner = depth * 2 if share == "rows" else depth
    stacks = [jnp.asarray(rng.standard_normal((2, n, inner)), jnp.float32).astype(FP8) for n in widths]
    second = (jnp.int32(1), 2)
    shares = {"row_share": second if share == "rows" else None, "column_share": second if share == "columns" else None}
    for used in (stacks, stacks[:1]):
        got = skinny_triton.triton(skinny_call(x, used, jnp.int32(1), **shares))
        want = skinny_matmul(x, used, jnp.int32(1), **shares, implementation="reference")
        for ours, theirs in zip(got, want, strict=True):
            assert ours.shape == theirs.shape
            assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_decode_8bit_of_extreme_rows(kind):
    """NaN and infinity stay visible in their own row; zeros, outliers and small rows are as good as others."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal((6, 64)).astype(np.float16)
    x[0], x[1, 5], x[2, 3], x[3, 7], x[4] = 0, np.nan, np.inf, 6e4, x[4] * np.float16(1e-3)
    data = jnp.asarray(rng.standard_normal((1, 40, 64)), jnp.float32)
    codes = [Codes(*quantise(data[..., None, :], CODES[kind]))] * 2
    call = decode_call(jnp.asarray(x)[None, :, None], *codes, 40, None, 1.0)
    got, want = (a[0, :, 0] for a in (decode_triton.triton(call).merged()[0], reference(call)[0]))
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    for row in (3, 4, 5):
        assert error(got[row], want[row]) <= 1e-3
    assert not np.isfinite(np.asarray(got[1:3])).any()


def test_mapped_calls_are_one_launch():
    """Under vmap, with bounds that differ and values that do not, as virtual shards have them; gradients included."""
    case = Case("shards", ((9, [0, 5, 12], 30, [40, 33, 20]),), (40,), batch=3, heads=2, kv_heads=1, dim=16)
    q, (k,), (v,) = make_inputs(case, jnp.float16)
    q, k, v = (jnp.nan_to_num(a) for a in (q, k, v))
    start, end = jnp.asarray([0, 5, 12]), jnp.asarray([40, 33, 20])

    def shard(q, k, v, start, end):
        call = make_call(q[None], (k[None],), (v[None],), (RowSegment(9, start, 30, end),), None)
        return jax.tree.map(lambda a: a[0], flash_triton.triton(call))

    mapped = jax.jit(jax.vmap(shard, in_axes=(0, 0, None, 0, 0)))
    arrays = q, k, v[0], start, end
    assert mapped.lower(*arrays).as_text().count("xla_ffi_python_cpu_callback") == 1
    got = mapped(*arrays)
    want = exact(case, q, (k,), (jnp.broadcast_to(v[0], v.shape),))
    assert error(got[0], want[0]) < 2e-3
    assert error(got[1], want[1]) < 1e-6
    grad = jax.grad(lambda q: mapped(q, *arrays[1:])[0].astype(jnp.float32).sum())(q)
    assert jnp.isfinite(grad.astype(jnp.float32)).all()
    assert grad.any()


def test_a_launch_that_no_gpu_takes_is_refused():
    launch = functools.partial(triton_launch.Launch, "rows", None, outputs=(), num_warps=4, num_stages=1)
    launch((1, 65535))
    with pytest.raises(ValueError, match="1 to 65535 blocks on its second axis"):
        launch((1, 65536))

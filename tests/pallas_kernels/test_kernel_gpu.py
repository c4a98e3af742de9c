"""Parity of the GPU implementations on the GPU: `JAX_PLATFORMS=cuda pytest -m gpu tests/pallas_kernels`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, LONG_CASES, Case, apb_case, check, error, exact, make_inputs, plain, random_tiles

from apb_jax.kv_codes import CODES, quantise
from pallas_kernels import Unsupported
from pallas_kernels.block_sparse_attention import Blocks, block_sparse_attention
from pallas_kernels.decode_attention import Codes, decode_attention
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.select import select_topk
from pallas_kernels.skinny_matmul import skinny_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.kernel,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU; JAX's default backend has none"),
]


@pytest.mark.parametrize(
    ("implementation", "dynamic"),
    [("mosaic_gpu", True), ("cudnn", False), ("cudnn", True), ("triton", True)],
    ids=["mosaic_gpu", "cudnn static", "cudnn run time", "triton"],
)
@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=lambda case: case.name)
def test_flash_attention(case, implementation, dynamic):
    rows = case.row_segments(dynamic)
    if implementation == "cudnn":  # offsets stay ints, as in the engine: cuDNN refuses others
        rows = tuple(
            RowSegment(a.rows, a.start, b.offset, a.end) for a, b in zip(rows, case.row_segments(False), strict=True)
        )

    def attend(q, k, v, case):
        return jax.jit(lambda q, k, v: flash_attention(q, k, v, rows, implementation=implementation))(q, k, v)

    try:
        check(case, jnp.bfloat16, attend)
    except Unsupported as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "keys", "lengths", "offset"),
    [
        (1, 4, 1, 128, 1000, [1000, 1, 0], None),
        (1, 8, 8, 64, 4096, [4096, 4000, 129], None),
        (7, 4, 2, 128, 333, [333, 200, 5], [326, 193, -2]),
        (40, 32, 8, 128, 2048, [2048, 1024, 640], [2008, 984, 600]),
        (200, 8, 2, 128, 515, [515, 400, 0], [315, 200, 0]),
    ],
)
def test_decode_attention(implementation, rows, heads, kv_heads, dim, keys, lengths, offset):
    lengths, offset = np.array(lengths), None if offset is None else np.array(offset)
    reach = 10**6 if offset is None else offset.tolist()
    case = Case("decode", ((rows, 0, reach, lengths.tolist()),), (keys,), 3, heads, kv_heads, dim)
    q, k, v = make_inputs(case, jnp.bfloat16)
    q = jnp.nan_to_num(q)
    read = (jnp.arange(keys) < lengths[:, None])[..., None, None]
    k, v = (jnp.where(read & jnp.isnan(a), jnp.ones_like(a), a) for a in (k[0], v[0]))
    out, lse = jax.jit(functools.partial(decode_attention, implementation=implementation))(
        q, k, v, jnp.asarray(lengths, jnp.int32), None if offset is None else jnp.asarray(offset, jnp.int32)
    )
    want, approximate = exact(case, q, (k,), (v,)), plain(case, q, (k,), (v,))
    assert error(out, want[0]) <= 2 * max(error(approximate[0], want[0]), 2**-8)
    assert error(lse, want[1]) <= 2 * max(error(approximate[1], want[1]), 1e-6)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("offset", [2**30, 2**31 - 1, -(2**31)])
def test_decode_attention_offsets_that_hide_nothing_or_everything(group, offset):
    """As the owner shard of a bottom-right query phase has them; 300 keys leave a partial tile."""
    q = jax.random.normal(jax.random.key(0), (2, 5, 2 * group, 128), jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(s), (2, 512, 2, 128), jnp.bfloat16) for s in (1, 2))
    lengths = jnp.asarray([300, 0 if offset < 0 else 511], jnp.int32)
    got = decode_attention(q, k, v, lengths, jnp.int32(offset), implementation="mosaic_gpu")
    seen = lengths if offset > 0 else jnp.zeros_like(lengths)
    want = decode_attention(*(a.astype(jnp.float32) for a in (q, k, v)), seen, implementation="reference")
    assert error(got[0], want[0]) < 1e-2
    assert error(got[1], want[1]) < 1e-5


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("batch", "rows", "slots"), [(1, 1, 2048), (3, 7, 520), (2, 1, 333)])
def test_decode_attention_of_a_stack(batch, rows, slots, dim):
    """Bit for bit what the kernel makes of the layer alone; the other layers hold NaN."""
    q = jax.random.normal(jax.random.key(0), (batch, rows, 8, dim), jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(s), (batch, slots, 2, dim), jnp.bfloat16) for s in (1, 2))
    lengths = slots - 5 * jnp.arange(batch, dtype=jnp.int32)
    run = jax.jit(functools.partial(decode_attention, implementation="mosaic_gpu"))
    want = run(q, k, v, lengths)
    for layer in range(3):
        stacks = [jnp.full((3, *a.shape), jnp.nan, a.dtype).at[layer].set(a) for a in (k, v)]
        got = run(q, *stacks, lengths, layer=jnp.int32(layer))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 333, 64), (1, 40000, 128), (40, 40000, 128)])
def test_decode_attention_over_8_bits(kind, rows, keys, dim):
    """Against the values that the codes stand for, short and long; scales behind the lengths are NaN."""
    rng = np.random.default_rng(5)
    q = jnp.asarray(rng.standard_normal((2, rows, 8, dim)), jnp.bfloat16)
    stacks = [jnp.asarray(rng.standard_normal((2, 2, keys, 2, dim)), jnp.float32) for _ in range(2)]
    lengths, layer = jnp.asarray([keys, keys - 100]), jnp.int32(1)
    behind = jnp.arange(keys)[:, None] >= lengths[None, :, None, None]
    codes = [quantise(a, CODES[kind]) for a in stacks]
    k, v = (Codes(values, jnp.where(behind, jnp.nan, scale)) for values, scale in codes)
    clean = [Codes(values, scale) for values, scale in codes]
    offset = lengths - rows
    run = {n: jax.jit(functools.partial(decode_attention, implementation=n)) for n in ("triton", "reference")}
    out, lse = run["triton"](q, k, v, lengths, offset, layer=layer)
    want, want_lse = run["reference"](q.astype(jnp.float32), *clean, lengths, offset, layer=layer)
    assert error(out, want) <= 2e-3
    assert error(lse, want_lse) <= 1e-3


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("rows", "depth", "widths", "shares"),
    [
        (1, 4096, (4096, 1024, 1024), 4),
        (4, 14336, (4096,), 4),
        (2, 512, (1024,), 8),
        (1, 256, (640, 640), 1),
        (64, 1088, (1728,), 1),
        (3, 64, (64,), 1),
    ],
)
def test_skinny_matmul(rows, depth, widths, shares, dtype, implementation):
    """Columns and rows by shares; the other layers hold NaN."""
    x = jax.random.normal(jax.random.key(0), (rows, depth), dtype)
    matrices = [jax.random.normal(jax.random.key(1 + n), (depth, w), dtype) / depth**0.5 for n, w in enumerate(widths)]
    stacks = [jnp.full((3, *m.shape), jnp.nan, dtype).at[1].set(m) for m in matrices]
    run = jax.jit(
        lambda x, stacks, index, by_rows: skinny_matmul(
            x, stacks, 1, implementation=implementation,
            **{"row_share" if by_rows else "column_share": (index, shares)},
        ),
        static_argnums=3,
    )  # fmt: skip
    columns = [run(x, stacks, jnp.int32(i), False) for i in range(shares)]
    part = depth // shares
    sums = [run(x[:, i * part : (i + 1) * part], stacks, jnp.int32(i), True) for i in range(shares)]
    for n, matrix in enumerate(matrices):
        want = jnp.matmul(x.astype(jnp.float32), matrix.astype(jnp.float32), precision="highest")
        plain_form = jnp.matmul(x, matrix)
        limit = 2 * max(error(plain_form, want), 1e-6)
        assert error(jnp.concatenate([out[n] for out in columns], axis=1), want) <= limit
        assert error(sum(out[n] for out in sums), want) <= limit


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(300, 100), (37, 37), (4096, 512), (20480, 2048), (16384, 1)])
def test_select(rows, count, ties):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, rows, 8)).astype(np.float32)
    scores = np.round(scores * 4) / 4 if ties else scores
    scores[0, : rows // 4] = np.finfo(np.float32).min
    scores[1, rows // 2 :] = -np.inf
    k, v = (jnp.asarray(rng.standard_normal((2, rows, 8, 64)), jnp.bfloat16) for _ in range(2))
    run = jax.jit(functools.partial(select_topk, count=count))
    got = run(jnp.asarray(scores), k, v)
    index = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(got[0], index)
    for chosen, source in zip(got[1:], (k, v), strict=True):
        np.testing.assert_array_equal(chosen, np.take_along_axis(np.asarray(source), index[..., None], axis=1))


def test_triton_kernels_under_vmap():
    """As virtual shards call them: bit for bit what each call alone gives; the bounds differ, a range is shared."""
    q, k, v = (
        jax.random.normal(jax.random.key(s), (4, 1, 200, h, 64), jnp.bfloat16) for s, h in ((0, 4), (1, 2), (2, 2))
    )
    starts = jnp.asarray([0, 7, 64, 150])

    def shard(q, k, v, start):
        rows = (RowSegment(200, start, 30, 400),)
        attended = flash_attention(q, (k, shared), (v, shared), rows, implementation="triton")
        return attended

    shared = k[0]
    together = jax.jit(jax.vmap(shard))(q, k, v, starts)
    for n in range(4):
        alone = jax.jit(shard)(q[n], k[n], v[n], starts[n])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a[n], b)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("rows", "keys", "block", "dim", "aligned", "columns"),
    [
        (1000, 1000, 64, 128, False, True),
        (640, 1664, 128, 128, True, False),
        (333, 333, 64, 64, False, True),
        (2048, 2048, 128, 64, True, False),
    ],
)
def test_block_sparse_attention(rows, keys, block, dim, aligned, columns, dtype, implementation):
    rng = np.random.default_rng(0)
    tiles = random_tiles(rng, 8, rows, keys, block, block, aligned, columns)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, h, dim)), dtype) for n, h in ((rows, 8), (keys, 2), (keys, 2)))
    shape = {"blocks": Blocks(block, block), "causal_offset": keys - rows}
    run = jax.jit(functools.partial(block_sparse_attention, **shape, implementation=implementation))
    out, lse = run(q, k, v, tiles)
    want = block_sparse_attention(
        *(a.astype(jnp.float32) for a in (q, k, v)), tiles, **shape, implementation="reference"
    )
    plain_form = block_sparse_attention(q, k, v, tiles, **shape, implementation="reference")
    assert error(out, want[0]) <= 2 * max(error(plain_form[0], want[0]), 2**-8)
    assert error(lse, want[1]) <= 2 * max(error(plain_form[1], want[1]), 1e-6)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shard", range(8))
def test_flash_attention_types(shard, dtype, dim):
    case = apb_case(shard, anchor=192, passing=64, block=448, dim=dim)

    def attend(q, k, v, case):
        return jax.jit(functools.partial(flash_attention, implementation="mosaic_gpu"))(
            q, k, v, case.row_segments(True)
        )

    check(case, dtype, attend)

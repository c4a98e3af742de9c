"""decode_attention, retaining_score, select_topk and block_sparse_attention against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, error, exact, plain, random_tiles

from pallas_kernels import KernelInputError, Unsupported
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.call import make_call as decode_call
from pallas_kernels.retaining_score import RowLimits, retaining_score
from pallas_kernels.select import select_topk
from pallas_kernels.skinny_matmul import skinny_matmul

PORTABLE = ("reference", "xla")


def in_shard_map(run, check_vma):
    """``run`` of replicated inputs inside a one-axis shard_map."""
    mesh = jax.make_mesh((2,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("sp")

    def local(*args):
        return jax.tree.map(lambda a: a[None], run(*jax.tree.map(lambda a: a[0], args)))

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))
    return lambda *args: jax.tree.map(lambda a: a[1], mapped(*jax.tree.map(lambda a: jnp.stack([a, a]), args)))


DECODE_CASES = (
    Case("one row", ((1, 0, 1000, [90, 1, 0]),), (90,), batch=3),
    Case("sixteen rows, multi-head", ((16, 0, 1000, 40),), (64,), heads=4, kv_heads=4),
    Case("causal rows, multi-query", ((5, 0, 30, 33),), (64,), heads=4, kv_heads=1, dim=128),
    Case("query phase", ((40, 0, [-3, 20], [50, 64]),), (64,), batch=2),
    Case("first key hidden from the first rows", ((4, 0, -2, 8),), (8,)),
)


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decode(case, implementation):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((case.batch, case.rows, case.heads, case.dim), np.float32)
    k, v = rng.standard_normal((2, case.batch, case.ranges[0], case.kv_heads, case.dim), np.float32)
    (_, _, offset, end), lengths = case.segments[0], np.broadcast_to(case.segments[0][3], case.batch)
    unread = np.arange(case.ranges[0]) >= lengths[:, None]
    k[unread], v[unread] = np.nan, np.nan
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    offset = None if offset == 1000 else jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (case.batch,))
    run = jax.jit(functools.partial(decode_attention, implementation=implementation))
    out, lse = run(q, k, v, jnp.asarray(end, jnp.int32), offset)
    assert out.dtype == lse.dtype == jnp.float32
    want, approximate = exact(case, q, (k,), (v,)), plain(case, q, (k,), (v,))
    assert error(out, want[0]) <= 2 * max(error(approximate[0], want[0]), 2**-8)
    assert error(lse, want[1]) <= 2 * max(error(approximate[1], want[1]), 1e-6)


@pytest.mark.parametrize("offset", [2**30, 2**31 - 1, 2**40, -(2**31)])
def test_decode_offsets_are_clipped_to_what_changes_anything(offset):
    """The Hopper kernel multiplies them by the query heads of a KV head, which must stay within 32 bits."""
    z = jnp.zeros((1, 3, 16, 8)), *[jnp.zeros((1, 20, 2, 8))] * 2
    call = decode_call(*z, 17, offset, None)
    assert call.causal_offset.tolist() == [20 if offset > 0 else -3]
    _, lse = decode_attention(*z, 17, offset)
    np.testing.assert_allclose(lse, np.log(17) if offset > 0 else -np.inf, rtol=1e-6)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_block_sparse_at_the_edge_of_32_bits(implementation):
    q, k, v = (jnp.ones((1, n, 1, 16)) for n in (8, 24, 24))
    starts = jnp.asarray([2**31 - 1, 2**31 - 8, -(2**31), 8], jnp.int32).reshape(1, 1, 1, 4)
    tiles = KeyTiles(starts, jnp.full((1, 1, 1), 4, jnp.int32))
    shape = {"blocks": Blocks(8, 8), "implementation": implementation}
    for offset, keys in ((2**31 - 1, 8), (-(2**31), 0)):
        _, lse = block_sparse_attention(q, k, v, tiles, causal_offset=offset, **shape)
        np.testing.assert_allclose(lse, 4 + np.log(8) if keys else -np.inf, rtol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("rows", [1, 20])
def test_decode_reads_its_layer_of_a_stack(rows, implementation):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, rows, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((3, 2, 32, 2, 16)), jnp.float32) for _ in range(2))
    lengths, offset = jnp.asarray([32, 30]), jnp.asarray([12, 10])
    run = jax.jit(functools.partial(decode_attention, implementation=implementation))
    for layer in range(3):
        got = run(q, k, v, lengths, offset, layer=jnp.int32(layer))
        want = run(q, k[layer], v[layer], lengths, offset)
        assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_skinny_matmul(implementation, dtype):
    """Whole matrices, shares of their columns and shares of their rows, of a layer in the middle."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 24)), dtype)
    stacks = tuple(jnp.asarray(rng.standard_normal((4, 24, n)), dtype) for n in (16, 8))
    want = [np.asarray(x, np.float64) @ np.asarray(stack[2], np.float64) for stack in stacks]
    run = jax.jit(functools.partial(skinny_matmul, implementation=implementation), static_argnames=("row_share",))
    got = run(x, stacks, jnp.int32(2))
    assert all(out.dtype == jnp.float32 for out in got)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    columns = [skinny_matmul(x, stacks, 2, column_share=(i, 4), implementation=implementation) for i in range(4)]
    for number, whole in enumerate(want):
        assert error(jnp.concatenate([part[number] for part in columns], axis=1), whole) < 1e-6
    rows = [
        skinny_matmul(x[:, 8 * i : 8 * i + 8], stacks, 2, row_share=(i, 3), implementation=implementation)
        for i in range(3)
    ]
    for number, whole in enumerate(want):
        assert error(sum(part[number] for part in rows), whole) < 1e-6


@pytest.mark.parametrize("check_vma", [False, True])
def test_skinny_matmul_in_shard_map(check_vma):
    rng = np.random.default_rng(0)
    x, stack = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 8), (2, 8, 4)))
    for implementation in PORTABLE:

        def run(x, stack, implementation=implementation):
            return skinny_matmul(x, [stack], 1, implementation=implementation)[0]

        assert error(in_shard_map(run, check_vma)(x, stack), x @ stack[1]) < 1e-6


@pytest.mark.parametrize("check_vma", [False, True])
def test_decode_in_shard_map(check_vma):
    q, k, v = (jnp.asarray(np.random.default_rng(0).standard_normal((1, n, 2, 16)), jnp.float32) for n in (3, 9, 9))
    want = decode_attention(q, k, v, 7)
    for implementation in PORTABLE:
        run = in_shard_map(lambda *a: decode_attention(*a, 7, implementation=implementation), check_vma)  # noqa: B023
        assert error(run(q, k, v)[0], want[0]) < 1e-6


def test_decode_partials_merge_to_the_whole():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 4, 16)), jnp.float32) for n in (2, 50, 50))
    whole, lse = decode_attention(q, k, v, 50)
    parts = [decode_attention(q, k[:, a:b], v[:, a:b], b - a) for a, b in ((0, 20), (20, 21), (21, 50))]
    lses = jnp.stack([part[1] for part in parts])
    weights = jnp.swapaxes(jax.nn.softmax(lses, axis=0), -1, -2)[..., None]
    assert error(sum(w * p[0] for w, p in zip(weights, parts, strict=True)), whole) < 1e-6
    assert error(jax.nn.logsumexp(lses, axis=0), lse) < 1e-6


def naive_scores(x, w1, w2, dead, masked, valid, pool=5):
    """The definition as loops, for one batch entry, in float64."""
    hidden = x.astype(np.float64) @ w1
    raw = hidden / (1 + np.exp(-hidden)) @ w2
    scores = np.full(raw.shape, -np.inf)
    for t in range(dead, valid):
        scores[t] = raw[max(t - pool // 2, dead) : min(t + pool // 2 + 1, valid)].max(axis=0)
        if t < masked:
            scores[t] = np.finfo(np.float32).min
    return scores


@pytest.mark.kernel
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_retaining_score(implementation, folded):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 23, 24)).astype(np.float32)
    w1, w2 = (rng.standard_normal(s).astype(np.float32) / 5 for s in ((24, 32), (32, 2)))
    dead, masked, valid = np.array([0, 4, 7]), np.array([6, 4, 0]), np.array([23, 22, 8])
    want = np.stack([naive_scores(x[b], w1, w2, dead[b], masked[b], valid[b]) for b in range(3)])
    for b in range(3):
        x[b, : dead[b]], x[b, valid[b] :] = np.nan, np.nan
    limits = RowLimits(*(jnp.asarray(limit, jnp.int32) for limit in (dead, masked, valid)))
    x, w1, w2 = map(jnp.asarray, (x, w1, w2))
    data = (None, None, w2) if folded else (x, w1, w2)
    got = retaining_score(*data, limits=limits, hidden=x @ w1 if folded else None, implementation=implementation)
    assert got.dtype == jnp.float32
    assert error(got, want) < 1e-6


@pytest.mark.kernel
def test_retaining_score_of_bfloat16_is_near_float32():
    rng = np.random.default_rng(0)
    x, w1, w2 = (jnp.asarray(rng.standard_normal(s) / 8, jnp.bfloat16) for s in ((1, 64, 96), (96, 128), (128, 4)))
    marks = {"limits": RowLimits(0, 0, 64)}
    exact_scores = retaining_score(x, w1, w2, **marks, implementation="reference")
    hidden = x @ w1
    plain_scores = retaining_score(None, None, w2.astype(jnp.float32), hidden=hidden.astype(jnp.float32), **marks)
    got = retaining_score(x, w1, w2, **marks, implementation="xla")
    assert error(got, exact_scores) <= 2 * error(plain_scores, exact_scores)


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("ties", [False, True])
def test_select(implementation, ties):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 37, 3)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[0, :9] = np.finfo(np.float32).min
    scores[1, 30:] = -np.inf
    k, v = (jnp.asarray(rng.standard_normal((2, 37, 3, 8)), jnp.bfloat16) for _ in range(2))
    for count in (1, 8, 37):
        run = jax.jit(functools.partial(select_topk, count=count, implementation=implementation))
        index, k_sel, v_sel = run(jnp.asarray(scores), k, v)
        want = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(index, want)
        for got, source in ((k_sel, k), (v_sel, v)):
            np.testing.assert_array_equal(got, np.take_along_axis(np.asarray(source), want[..., None], axis=1))


@pytest.mark.parametrize("check_vma", [False, True])
def test_scores_and_selection_in_shard_map(check_vma):
    rng = np.random.default_rng(0)
    x, w1, w2 = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 16, 8), (8, 12), (12, 2)))
    k = jnp.asarray(rng.standard_normal((1, 16, 2, 4)), jnp.float32)

    def run(x, w1, w2, k):
        scores = retaining_score(x, w1, w2, limits=RowLimits(2, 5, 16))
        return select_topk(scores, k, k, 3)

    for got, want in zip(in_shard_map(run, check_vma)(x, w1, w2, k), run(x, w1, w2, k), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize(("aligned", "columns"), [(True, False), (False, True)])
def test_block_sparse(implementation, aligned, columns):
    rng = np.random.default_rng(2)
    rows, keys, heads, block_q, block_k = 43, 61, 4, 8, 12
    tiles = random_tiles(rng, heads, rows, keys, block_q, block_k, aligned, columns)
    q = rng.standard_normal((1, rows, heads, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, keys, 2, 16)).astype(np.float32)
    visible = np.zeros((heads, rows, keys), bool)
    for h, i in np.ndindex(heads, rows):
        t = i // block_q
        for start in tiles.starts[0, h, t, : int(tiles.counts[0, h, t])]:
            visible[h, i, int(start) : int(start) + block_k] = True
        if columns:
            visible[h, i, np.asarray(tiles.columns[0, h, t, : int(tiles.column_counts[0, h, t])])] = True
        visible[h, i, i + 18 + 1 :] = False
    scores = np.einsum("shd,thd->hst", q[0], np.repeat(k[0], 2, axis=1)) / 4.0
    weights = np.where(visible, np.exp(scores), 0)
    total = weights.sum(axis=-1)
    want = np.einsum("hst,thd->shd", weights / np.where(total, total, 1)[..., None], np.repeat(v[0], 2, axis=1))
    with np.errstate(divide="ignore"):
        want_lse = np.log(total)
    run = jax.jit(
        functools.partial(block_sparse_attention, blocks=Blocks(block_q, block_k), implementation=implementation)
    )
    out, lse = run(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), tiles, causal_offset=jnp.int32(18))
    assert error(out[0], want) < 1e-5
    assert error(lse[0], want_lse) < 1e-5


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("keys", [5, 61])
def test_block_sparse_windows_that_stick_out(implementation, keys, monkeypatch):
    """Windows before the first key and past the last, longer than all keys; unread keys hold NaN; several steps."""
    monkeypatch.setattr("pallas_kernels.block_sparse_attention.xla.STEP_KEYS", 16)
    rng = np.random.default_rng(3)
    batch, rows, heads, block_q, block_k = 2, 21, 2, 8, 8
    starts = np.asarray([-5, keys - 2, 12, 30, -20, keys + 9], np.int32)
    tiles = KeyTiles(
        jnp.broadcast_to(jnp.asarray(starts), (batch, heads, 3, len(starts))),
        jnp.asarray(rng.integers(0, len(starts) + 1, (batch, heads, 3)), jnp.int32),
    )
    q = rng.standard_normal((batch, rows, heads, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, keys, 1, 16)).astype(np.float32)
    offset = np.asarray([40, 3])
    granted = np.zeros((batch, heads, rows, keys), bool)
    for b, h, i in np.ndindex(batch, heads, rows):
        for start in starts[: int(tiles.counts[b, h, i // block_q])]:
            granted[b, h, i, max(0, start) : max(0, start + block_k)] = True
        granted[b, h, i, max(0, i + offset[b] + 1) :] = False
    scores = np.einsum("bshd,btd->bhst", q, k[:, :, 0]) / 4.0
    weights = np.where(granted, np.exp(scores), 0)
    total = weights.sum(axis=-1)
    want = np.einsum("bhst,btd->bshd", weights / np.where(total, total, 1)[..., None], v[:, :, 0])
    unread = ~granted.any(axis=(1, 2))
    k[unread], v[unread] = np.nan, np.nan
    run = functools.partial(block_sparse_attention, blocks=Blocks(block_q, block_k), implementation=implementation)
    out, lse = jax.jit(run)(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), tiles, causal_offset=jnp.asarray(offset))
    assert error(out, want) < 1e-5
    np.testing.assert_array_equal(np.isneginf(lse), total == 0)


def test_block_sparse_in_shard_map():
    rng = np.random.default_rng(0)
    tiles = random_tiles(rng, 2, 16, 24, 8, 6, True, True)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 8)), jnp.float32) for n in (16, 24, 24))
    run = functools.partial(block_sparse_attention, blocks=Blocks(8, 6))
    for check_vma in (False, True):
        got = in_shard_map(run, check_vma)(q, k, v, tiles)
        assert error(got[0], run(q, k, v, tiles)[0]) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: decode_attention(z((1, 1, 3, 8)), z((1, 4, 2, 8)), z((1, 4, 2, 8)), 4), "2 KV heads do not divide"),
        (lambda z: decode_attention(z((1, 1, 2, 8)), z((1, 4, 2, 8)), z((1, 5, 2, 8)), 4), "must both be"),
        (
            lambda z: decode_attention(z((1, 1, 2, 8)), *[z((1, 4, 2, 8))] * 2, 4, layer=0),
            r"must both be \[L, B, T, K, D\]",
        ),
        (lambda z: skinny_matmul(z((1, 8)), [z((2, 8, 6))], 0, column_share=(0, 4)), "4 shares do not divide 6"),
        (lambda z: skinny_matmul(z((1, 8)), [z((2, 9, 6))], 0), "with x"),
        (lambda z: skinny_matmul(z((1, 8)), [], 0), "stacks is empty"),
        (lambda z: skinny_matmul(z((1, 8)), [z((2, 8, 6))], z((2,))), "it must be a scalar"),
        (lambda z: select_topk(z((1, 4, 2)), z((1, 4, 2, 8)), z((1, 4, 2, 8)), 5), "count is 5"),
        (
            lambda z: retaining_score(z((1, 4, 6)), z((5, 3)), z((3, 2)), limits=RowLimits(0, 0, 4)),
            r"w1 has shape \(5, 3\); it must be \[6, F\]",
        ),
        (
            lambda z: retaining_score(z((1, 4, 6)), z((6, 3)), z((3, 2)), limits=RowLimits(0, 0, 4), pool=4),
            "pool is 4; it must be odd",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(KernelInputError, match=message):
        call(jnp.zeros)


def test_named_implementations_refuse_with_a_reason():
    z = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(Unsupported, match="decode_attention: mosaic_gpu needs an NVIDIA Hopper GPU"):
        decode_attention(z[:, :1], z, z, 4, implementation="mosaic_gpu")

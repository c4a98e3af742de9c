"""The logic of the Pallas Triton kernels, emulated: what they compute and that they stay inside their arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, apb_case, check, error, random_tiles
from triton_emulator import emulated

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention import triton as block_sparse_triton
from pallas_kernels.block_sparse_attention.call import make_call as block_sparse_call
from pallas_kernels.flash_attention.call import make_call
from pallas_kernels.flash_attention.triton import forward
from pallas_kernels.select.call import SelectCall
from pallas_kernels.select.triton import triton

CASES = (
    Case("causal, odd length", ((77, 0, 0, 77),), (77,), heads=2, kv_heads=1, dim=16),
    Case("lengths and starts", ((5, [0, 33, 60], 1000, [90, 60, 60]),), (90,), batch=3, heads=1, kv_heads=1, dim=16),
    Case("segments", ((20, 0, 0, 90), (7, 40, 100, 60), (33, 30, 57, 90)), (30, 27, 33), heads=2, kv_heads=1, dim=16),
    *(apb_case(shard, shards=4, heads=2, kv_heads=1, dim=16) for shard in range(4)),
)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash_attention(case):
    def attend(q, k, v, case):
        with emulated():
            return forward(make_call(q, k, v, case.row_segments(True), None))

    check(case, jnp.bfloat16, attend)


@pytest.mark.kernel
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(300, 140), (37, 37), (64, 1)])
def test_select(rows, count, ties):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, rows, 2)).astype(np.float32)
    scores = np.round(scores * 2) / 2 if ties else scores
    scores[0, : rows // 4] = np.finfo(np.float32).min
    scores[1, rows // 2 :] = -np.inf
    k, v = (jnp.asarray(rng.standard_normal((2, rows, 2, 4)), jnp.bfloat16) for _ in range(2))
    with emulated():
        got = triton(SelectCall(jnp.asarray(scores), k, v, count))
    index = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(got[0], index)
    for chosen, source in zip(got[1:], (k, v), strict=True):
        np.testing.assert_array_equal(chosen, np.take_along_axis(np.asarray(source), index[..., None], axis=1))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rows", "keys", "block_q", "block_k", "aligned", "columns", "most_elements"),
    [
        (43, 61, 16, 16, True, False, None),
        (43, 61, 16, 16, False, True, None),
        (43, 61, 16, 16, False, True, 2000),
        (70, 140, 32, 128, True, False, None),
    ],
)
def test_block_sparse(rows, keys, block_q, block_k, aligned, columns, most_elements, monkeypatch):
    rng = np.random.default_rng(2)
    tiles = random_tiles(rng, 4, rows, keys, block_q, block_k, aligned, columns)
    q = jnp.asarray(rng.standard_normal((1, rows, 4, 16)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, keys, 2, 16)), jnp.bfloat16) for _ in range(2))
    if most_elements is not None:  # fewer than both KV heads need, more than one does: two launches
        monkeypatch.setattr(block_sparse_triton, "MOST_ELEMENTS", most_elements)
    with emulated():
        out, lse = block_sparse_triton.triton(block_sparse_call(q, k, v, tiles, block_q, block_k, keys - rows, None))
    shape = {"block_q": block_q, "block_k": block_k, "causal_offset": keys - rows}
    want, plain = (
        block_sparse_attention(*(a.astype(dtype) for a in (q, k, v)), tiles, **shape, implementation=name)
        for dtype, name in ((jnp.float32, "reference"), (jnp.bfloat16, "xla"))
    )
    assert error(out, want[0]) <= 2 * max(error(plain[0], want[0]), 2**-8)
    assert error(lse, want[1]) <= 1e-5

"""The logic of the Pallas Triton kernels, emulated: what they compute and that they stay inside their arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, apb_case, check
from triton_emulator import emulated

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

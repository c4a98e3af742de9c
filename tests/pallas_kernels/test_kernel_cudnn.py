"""How calls are cut into cuDNN calls and merged, with a stand-in for cuDNN that runs anywhere."""

import jax
import jax.numpy as jnp
import pytest
from attention_cases import CASES, apb_case, check, make_inputs

from pallas_kernels import Unsupported
from pallas_kernels.device import HOPPER, assume
from pallas_kernels.flash_attention import RowSegment, cudnn, flash_attention
from pallas_kernels.flash_attention.reference import softmax_attention


def stand_in(q, k, v, *, scale, mask_type, return_residual, q_seqlen=None, kv_seqlen=None):
    """cuDNN's contract for the four masks that are used: prefix lengths and a top-left causal triangle."""
    assert return_residual
    rows, keys = q.shape[1], k.shape[1]
    visible = jnp.ones((q.shape[0], 1, rows, keys), bool)
    if mask_type in (cudnn.fused.MaskType.CAUSAL, cudnn.fused.MaskType.PADDING_CAUSAL):
        visible &= jnp.arange(keys) <= jnp.arange(rows)[:, None]
    if mask_type in (cudnn.fused.MaskType.PADDING, cudnn.fused.MaskType.PADDING_CAUSAL):
        visible &= (jnp.arange(keys) < kv_seqlen[:, None])[:, None, None]
    out, lse = softmax_attention(q, k, v, visible, scale)
    return out.astype(q.dtype), lse


@pytest.fixture
def fake_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", stand_in)
    with assume(HOPPER):
        yield


def bounds_of_the_engine(case, dynamic):
    """Offsets as ints, the other bounds as device scalars where ``dynamic``."""
    pairs = zip(case.row_segments(dynamic), case.row_segments(False), strict=True)
    return tuple(RowSegment(a.rows, a.start, b.offset, a.end) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "run time"])
@pytest.mark.parametrize("case", [CASES[0], *CASES[8:17], *CASES[22:]], ids=lambda case: case.name)
def test_composition(case, dynamic, fake_cudnn):
    def attend(q, k, v, case):
        run = jax.jit(lambda q, k, v: flash_attention(q, k, v, rows, implementation="cudnn"))
        return run(q, k, v)

    rows = bounds_of_the_engine(case, dynamic)
    check(case, jnp.bfloat16, attend)


def test_a_static_start_inside_a_triangle_is_refused(fake_cudnn):
    q, k, v = (jnp.ones((1, 8, n, 16), jnp.bfloat16) for n in (4, 2, 2))
    with pytest.raises(Unsupported, match="cannot start a causal triangle at key 3 inside its range"):
        flash_attention(q, (k,), (v,), (RowSegment(8, 3, 0, 8),), implementation="cudnn")


def test_a_run_time_start_inside_a_triangle_is_nan_not_wrong(fake_cudnn):
    q, k, v = (jnp.ones((1, 8, n, 16), jnp.bfloat16) for n in (4, 2, 2))
    rows = (RowSegment(8, jnp.int32(3), 0, 8),)
    out, lse = flash_attention(q, (k,), (v,), rows, implementation="cudnn")
    assert jnp.isnan(lse).all()
    assert jnp.isnan(out).all()


def test_nan_survives_the_merge_with_other_ranges(fake_cudnn):
    """A start at run time inside the triangle of the second range: its rows are NaN, the other segment's are not."""
    q, *kv = (jnp.ones((1, n, h, 16), jnp.bfloat16) for n, h in ((16, 4), (8, 2), (8, 2)))
    rows = (RowSegment(8, 0, 0, 8), RowSegment(8, jnp.int32(11), 8, 16))
    out, lse = flash_attention(q, tuple(kv), tuple(kv), rows, implementation="cudnn")
    assert jnp.isnan(out[:, 8:]).all()
    assert jnp.isnan(lse[:, :, 8:]).all()
    assert jnp.isfinite(out[:, :8].astype(jnp.float32)).all()


def test_plain_causal_attention_is_one_differentiable_call(fake_cudnn, monkeypatch):
    calls = []
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", lambda *a, **b: calls.append(b) or stand_in(*a, **b))
    q, k = jnp.ones((1, 8, 4, 16), jnp.bfloat16), jnp.ones((1, 8, 2, 16), jnp.bfloat16)
    rows = (RowSegment(8, 0, 0, 8),)
    jax.grad(lambda q: flash_attention(q, (k,), (k,), rows, implementation="cudnn")[0].sum())(q)
    assert [call["mask_type"] for call in calls] == [cudnn.fused.MaskType.CAUSAL]


def test_a_merge_is_differentiated_by_recomputation(fake_cudnn):
    case = apb_case(2, shards=4, dim=16)
    q, k, v = make_inputs(case, jnp.bfloat16)
    rows = bounds_of_the_engine(case, True)

    def loss(q, implementation):
        return flash_attention(q, k, v, rows, implementation=implementation)[0].astype(jnp.float32).sum()

    got, want = (jax.jit(jax.grad(loss), static_argnums=1)(q, name) for name in ("cudnn", "xla_chunked"))
    assert (got == want).all()
    assert jnp.isfinite(got.astype(jnp.float32)).all()

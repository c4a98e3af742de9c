"""Attention with e4m3 products: the arithmetic on a CPU, the kernel where it lowers, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, LONG_CASES, apb_case, exact, make_inputs
from test_kernel_lowering import flash_inputs, lower

from pallas_kernels import Unsupported
from pallas_kernels.device import HOPPER, Device, assume
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.eight_bit import EightBit
from pallas_kernels.flash_attention.probabilities import GROUP, KEY_ORDER

RECIPES = {"scores": EightBit(values=False), "both": EightBit()}
TOLERANCE = {"scores": 0.09, "both": 0.11}
"""Relative error of the result; docs/numerics.md. A lone key with unit normal values loses 2 to 3% of them."""


@functools.partial(jax.jit, static_argnames=("eight", "implementation"))
def attend(q, k, v, rows, eight, implementation=None):
    return flash_attention(q, k, v, rows, implementation=implementation, eight=eight)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", [*CASES[9:16:2], CASES[19], LONG_CASES[1], LONG_CASES[3]], ids=lambda case: case.name)
def test_every_mask(case, recipe):
    inputs = make_inputs(case, jnp.float32)
    out, lse = attend(*inputs, case.row_segments(True), RECIPES[recipe])
    want, want_lse = exact(case, *inputs)
    error = np.linalg.norm(out - want) / max(np.linalg.norm(want), 1e-9)
    assert error < TOLERANCE[recipe]
    seen = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(lse), ~seen)
    np.testing.assert_allclose(np.asarray(lse)[seen], want_lse[seen], atol=0.15)


def test_the_error_does_not_grow_with_the_keys():
    errors = {}
    for keys in (256, 4096):
        rng = np.random.default_rng(keys)
        q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 64)), jnp.float32) for n in (16, keys, keys))
        from pallas_kernels.flash_attention import RowSegment

        rows = (RowSegment(16, 0, keys, keys),)
        out, _ = attend(q, (k,), (v,), rows, RECIPES["both"])
        want, _ = attend(q, (k,), (v,), rows, None)
        errors[keys] = float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want))
    assert errors[4096] < 1.3 * errors[256]


def test_a_common_part_of_the_keys_costs_nothing():
    """What all keys share moves no softmax; without subtracting the mean it would take all of e4m3's bits."""
    case = LONG_CASES[0]
    q, (k,), v = make_inputs(case, jnp.float32)
    rows = case.row_segments(True)
    plain, plain_lse = attend(q, (k,), v, rows, RECIPES["both"])
    moved, moved_lse = attend(q, (k + 50.0,), v, rows, RECIPES["both"])
    want, _ = attend(q, (k,), v, rows, None)
    assert np.linalg.norm(moved - want) < 1.1 * np.linalg.norm(plain - want)
    added = 50.0 * q.sum(axis=-1).transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    np.testing.assert_allclose(moved_lse, plain_lse + added, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("fill", [0.0, 1e-40, 1e4])
def test_zeros_subnormals_and_outliers(fill):
    case = LONG_CASES[0]
    q, (k,), (v,) = make_inputs(case, jnp.float32)
    arrays = [array.at[:, 5].set(fill) for array in (q, k, v)]
    out, lse = attend(arrays[0], (arrays[1],), (arrays[2],), case.row_segments(True), RECIPES["both"])
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(lse).all()


def test_keys_in_the_operands_order():
    """Thread t of four holds accumulator columns 2t, 2t + 1 of each 8 and feeds operand columns 4t ... 4t + 3."""
    assert sorted(KEY_ORDER) == list(range(GROUP))
    for new, old in enumerate(KEY_ORDER):
        assert new // 4 == old % 8 // 2


@pytest.mark.lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_lowers_for_hopper(dim, recipe):
    case = apb_case(3, anchor=256, passing=128, block=500, dim=dim)
    run = functools.partial(flash_attention, implementation="mosaic_gpu", eight=RECIPES[recipe])
    text = lower(run, *flash_inputs(case), case.row_segments(True))
    assert "mosaic_gpu" in text
    assert "f8E4M3FN" in text


@pytest.mark.parametrize("name", ["cudnn", "reference"])
def test_a_named_kernel_without_8_bit_products_refuses(name):
    case = CASES[0]
    with assume(HOPPER), pytest.raises(Unsupported, match="8-bit"):
        flash_attention(
            *make_inputs(case, jnp.bfloat16), case.row_segments(False), implementation=name, eight=EightBit()
        )


def test_no_gpu_before_hopper_and_no_emulation_on_one():
    case = CASES[0]
    with assume(Device("gpu", "NVIDIA A100", (8, 0))), pytest.raises(ExceptionGroup) as refused:
        flash_attention(*make_inputs(case, jnp.bfloat16), case.row_segments(False), eight=EightBit())
    assert "emulates" in str(refused.value.exceptions)

"""e4m3 with a scale a row: extreme rows, the emulated product, skinny products, and on GPUs what XLA makes of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from apb_jax.presets import MODELS
from benchmarks.precision_hlo import hlo_facts
from benchmarks.precision_products import Model
from pallas_kernels import device
from pallas_kernels.errors import KernelInputError
from pallas_kernels.float8 import CUBLAS_ONLY, FP8, LARGEST, dequantise, product, quantise
from pallas_kernels.skinny_matmul import skinny_matmul

pytestmark = pytest.mark.kernel
HOPPER_OR_ADA = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: XLA rewrites 8-bit products for cuBLASLt there alone"
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


ROWS = {
    "zeros": np.zeros(64),
    "an outlier of 1e4": np.r_[1e4, normal(63)],
    "the largest float32": np.r_[3.4e38, normal(63)],
    "subnormals": np.full(64, 1e-40),
    "the smallest scales": normal(64) * 1e-30,
    "signed zeros": np.r_[-0.0, np.zeros(63)],
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_extreme_rows_stay_finite(name: str, dtype: jnp.dtype) -> None:
    """No NaN, no infinity, no scale of 0, and an error of half a step of e4m3 of the row's largest value at most."""
    row = jnp.asarray(ROWS[name], jnp.float32).astype(dtype)[None]
    row = jnp.clip(row, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    values, scale = jax.jit(quantise)(row)
    back = np.asarray(dequantise(values, scale))
    assert values.dtype == FP8
    assert float(scale[0, 0]) > 0
    assert np.isfinite(float(1 / scale[0, 0]))
    assert np.isfinite(back).all()
    largest = float(jnp.max(jnp.abs(row)))
    if largest > 1e-20:
        assert np.abs(back - np.asarray(row, np.float32)).max() <= largest / 28 * 1.001  # 16 of 448: half of 32
        assert np.abs(np.asarray(values, np.float32)).max() == LARGEST
    else:
        assert not back.any() or np.abs(back).max() <= 2 * largest


def test_nan_and_infinity_stay_visible() -> None:
    """A row that holds one gives nothing finite at all; its neighbour is untouched."""
    rows = normal(3, 16)
    rows[0, 3], rows[1, 5] = np.nan, np.inf
    back = np.asarray(dequantise(*quantise(jnp.asarray(rows))))
    assert not np.isfinite(back[0]).any()
    assert not np.isfinite(back[1]).any()
    assert np.isfinite(back[2]).all()


def test_values_are_rounded_to_nearest() -> None:
    """As ml_dtypes rounds in numpy; relative errors of normal data: 2**-4 at most, 2.6% in the mean square."""
    x = normal(8, 4096)
    values, scale = quantise(jnp.asarray(x))
    expected = (x * (np.float32(1) / np.asarray(scale))).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected.view(np.uint8))
    back = np.asarray(dequantise(values, scale))
    large = np.abs(x) > np.asarray(scale) * 2.0**-6  # the normal e4m3 values
    assert (np.abs(back - x) / np.abs(x))[large].max() <= 2.0**-4 + 1e-6
    assert 0.02 < np.linalg.norm(back - x) / np.linalg.norm(x) < 0.03


def test_the_product_is_that_of_the_quantised_operands() -> None:
    """Emulated here, on tensor cores there: against float32 products of the dequantised operands, and of the data."""
    x, w = jnp.asarray(normal(24, 512)), jnp.asarray(normal(96, 512, seed=1))
    (xv, xs), (wv, ws) = quantise(x), quantise(w)
    got = np.asarray(jax.jit(functools.partial(product, dtype=jnp.float32))(xv, wv) * xs * ws[:, 0])
    same = np.asarray(dequantise(xv, xs)) @ np.asarray(dequantise(wv, ws)).T
    exact = np.asarray(x) @ np.asarray(w).T
    scale = np.linalg.norm(exact)
    limit = 1e-6 if jax.default_backend() == "cpu" else 5e-3  # Hopper keeps about 14 bits of short sums
    assert np.linalg.norm(got - same) / scale < limit
    assert 0.02 < np.linalg.norm(got - exact) / scale < 0.05


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("share", ["none", "rows", "columns"])
def test_skinny_products_of_e4m3_matrices(implementation: str, share: str) -> None:
    """Read where they lie, whole or a share of rows or columns, two widths at once."""
    x, layer, index = jnp.asarray(normal(3, 64)), 1, 1
    wide = [normal(2, n, 128 if share == "rows" else 64, seed=n) for n in (32, 48)]
    stacks, scales = zip(*(quantise(jnp.asarray(w)) for w in wide), strict=True)
    shares = {} if share == "none" else {f"{share.removesuffix('s')}_share": (jnp.int32(index), 2)}
    got = skinny_matmul(x, stacks, jnp.int32(layer), implementation=implementation, **shares)
    for out, stack, width in zip(got, stacks, (32, 48), strict=True):
        matrix = np.asarray(stack[layer], np.float32)
        matrix = matrix[:, 64:] if share == "rows" else matrix[width // 2 :] if share == "columns" else matrix
        np.testing.assert_allclose(np.asarray(out), np.asarray(x) @ matrix.T, rtol=2e-5, atol=1e-3)
    assert scales[0].shape == (2, 32, 1)


def test_skinny_products_refuse_mixed_stacks() -> None:
    x = jnp.zeros((1, 64))
    with pytest.raises(KernelInputError, match=r"float32 and float32; they must agree, or all stacks be float8_e4m3fn"):
        skinny_matmul(x, [jnp.zeros((2, 32, 64), FP8), jnp.zeros((2, 64, 32))], 0)
    with pytest.raises(KernelInputError, match=r"it must be \[L, O', 64 x 1 shares\]"):
        skinny_matmul(x, [jnp.zeros((2, 64, 32), FP8)], 0)


def test_what_is_read_off_hlo() -> None:
    """Made-up lines: an 8-bit product, a 16-bit one, a transposed weight, a wide copy; fused ones do not count."""
    text = """
%fused_computation (p: f8e4m3fn[64,32]) -> bf16[64,32] {
  ROOT %c = bf16[64,32]{1,0} convert(%p)
}
ENTRY %main {
  %a = (bf16[8,64]{1,0}, s8[4]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul$f8"
  %b = bf16[8,64]{1,0} custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %t = f8e4m3fn[32,64]{1,0} transpose(%w), dimensions={1,0}
  %wide = bf16[32,64]{1,0} convert(%t)
}
"""
    facts = hlo_facts(text, [(64, 32)])
    assert (facts.f8_calls, facts.other_products, facts.f8_transposes, facts.wide_weights) == (1, 1, 1, 1)


def small_model(fp8: bool) -> Model:
    config = dataclasses.replace(
        MODELS["llama3.1-8b"].config, hidden_size=1024, intermediate_size=3072, num_heads=8, num_kv_heads=4
    )
    return Model(config, 2, fp8=fp8)


def test_layers_hand_plain_e4m3_operands_to_xla() -> None:
    """As lowered for CUDA: all products along the last axes, no transpose and no wider copy of a weight.

    JAX writes equal products once and calls them, so that their shapes are counted, not their lines.
    """
    model = small_model(fp8=True)
    x = jax.ShapeDtypeStruct((1, 128, 1024), jnp.bfloat16)
    run = jax.jit(functools.partial(model.run, in_place=False))
    with device.assume(device.HOPPER):
        traced = run.trace(model.state, x, jax.ShapeDtypeStruct((), jnp.int32))
        lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    narrow = [line for line in products if line.count("xf8E4M3FN>") == 2]
    sides = {f"{out}x{inner}" for out, inner in model.facts}
    assert len(products) == len(narrow)
    assert {side for side in sides for line in narrow if f"tensor<{side}xf8E4M3FN>) ->" in line} == sides
    assert all("contracting_dims = [1] x [1]" in line and "xbf16>" in line for line in narrow)
    from_weights = [line for line in lines if any(f"tensor<{side}xf8E4M3FN>" in line for side in sides)]
    assert len(from_weights) >= len(sides)
    assert not [line for line in from_weights if "stablehlo.convert" in line or "stablehlo.transpose" in line]


@pytest.mark.gpu
@HOPPER_OR_ADA
@pytest.mark.parametrize("rows", [128, 4096])
def test_layers_multiply_in_8_bits_on_gpus(rows: int) -> None:
    """The optimised program of whole layers: 8-bit products, no transpose of a weight, no copy of one in 16 bits."""

    model = small_model(fp8=True)
    _, _, text = model.program(rows, in_place=False, options=CUBLAS_ONLY)
    facts = hlo_facts(text, model.facts)
    assert 4 <= facts.f8_calls <= 7, facts  # XLA joins small products of the same rows: q, k, v, and gate, up
    assert (facts.other_products, facts.f8_transposes, facts.wide_weights) == (0, 0, 0), facts


@pytest.mark.gpu
@HOPPER_OR_ADA
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
def test_skinny_products_on_hopper(rows: int) -> None:
    """What is chosen against the reference (one row XLA, more the Triton kernel); e4m3 matrices, float32 sums."""
    x = jnp.asarray(normal(rows, 4096)).astype(jnp.bfloat16)
    stacks = [quantise(jnp.asarray(normal(2, n, 4096, seed=n)))[0] for n in (1024, 320)]
    chosen = "xla" if rows == 1 else "triton"
    run = {name: jax.jit(functools.partial(skinny_matmul, implementation=name)) for name in (chosen, "reference")}
    for got, want in zip(*(one(x, stacks, jnp.int32(1)) for one in run.values()), strict=True):
        assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 2e-3


@pytest.mark.gpu
@HOPPER_OR_ADA
@pytest.mark.parametrize("name", ["zeros", "an outlier of 1e4", "subnormals"])
def test_extreme_rows_through_cublas(name: str) -> None:
    """8-bit products of rows of zeros, outliers and subnormals are finite."""
    x = jnp.asarray(np.tile(ROWS[name], (32, 4)), jnp.bfloat16)
    values, scale = quantise(x)
    weights, own = quantise(jnp.asarray(normal(64, 256)))
    out = jax.jit(functools.partial(product, dtype=jnp.bfloat16))(values, weights).astype(jnp.float32) * scale
    assert np.isfinite(np.asarray(out * own[:, 0])).all()

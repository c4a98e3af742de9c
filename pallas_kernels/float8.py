"""8-bit floats (e4m3) with one scale a row: how weights and the rows that they multiply are quantised."""

import jax
import jax.numpy as jnp
from jax import lax

FP8 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0
"""The largest e4m3 value; it has no infinity."""
LEAST_SCALE = 2.0**-96
"""Under it a row counts as zeros: scales are never 0, and neither they nor their inverses are subnormal."""


CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options for GPU programs with 8-bit products: XLA then takes cuBLASLt without trying its own generator.

Trying took 27 s a shape on an H100 and found nothing faster; without it whole layers compile in a second.
"""


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(e4m3 values [..., n], float32 scales [..., 1]): the largest magnitude of each row becomes 448.

    NaN and infinity in a row make its scale NaN or infinite: they stay visible.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) * jnp.float32(1 / LARGEST), LEAST_SCALE)
    return (wide * (1 / scale)).astype(FP8), scale


def dequantise(values: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values * scale, formed in float32 and rounded once."""
    return (values.astype(jnp.float32) * scale).astype(dtype)


def product(x: jax.Array, matrix: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x [R, I] times matrix [O, I] along the last axes of both: e4m3 values in, ``dtype`` out, summed in float32.

    On Hopper and Ada XLA gives plain e4m3 operands that lie so to cuBLASLt without a transpose; a precision other than
    the default would switch its fast accumulation off.
    """
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

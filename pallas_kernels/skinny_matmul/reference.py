"""The definition: float32 products; with matrices in e4m3 of x as its rows are quantised."""

import jax
import jax.numpy as jnp

from pallas_kernels.float8 import dequantise, quantise
from pallas_kernels.skinny_matmul.call import MatmulCall


def reference(call: MatmulCall) -> tuple[jax.Array, ...]:
    """For each stack float32 [R, columns]."""
    if call.fp8:
        rounded = dequantise(*quantise(call.x))
        return tuple(jnp.matmul(rounded, m.astype(jnp.float32).T, precision="highest") for m in call.matrices())
    x = call.x.astype(jnp.float32)
    return tuple(jnp.matmul(x, matrix.astype(jnp.float32), precision="highest") for matrix in call.matrices())

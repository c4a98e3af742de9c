"""The definition: float32 products."""

import jax
import jax.numpy as jnp

from pallas_kernels.skinny_matmul.call import MatmulCall


def reference(call: MatmulCall) -> tuple[jax.Array, ...]:
    """For each stack float32 [R, columns]."""
    x = call.x.astype(jnp.float32)
    wide = (matrix.astype(jnp.float32) for matrix in call.matrices())
    return tuple(jnp.matmul(x, matrix.T if call.fp8 else matrix, precision="highest") for matrix in wide)

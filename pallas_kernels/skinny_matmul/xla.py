"""Through XLA: a product, or for one row on a GPU a reduction."""

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.skinny_matmul.call import MatmulCall


def xla(call: MatmulCall) -> tuple[jax.Array, ...]:
    """For each stack float32 [R, columns]."""
    if call.fp8:
        return _fp8(call)
    if call.x.shape[0] == 1 and device.current().platform == "gpu":
        # XLA fuses the slice of the stack into a reduction; a matrix product would copy the slice first.
        wide = call.x.astype(jnp.float32).T
        return tuple(jnp.sum(wide * matrix.astype(jnp.float32), axis=0)[None] for matrix in call.matrices())
    precision = "highest" if call.x.dtype == jnp.float32 else None
    return tuple(
        jnp.matmul(call.x, matrix, precision=precision, preferred_element_type=jnp.float32)
        for matrix in call.matrices()
    )


def _fp8(call: MatmulCall) -> tuple[jax.Array, ...]:
    if call.x.shape[0] == 1 and device.current().platform == "gpu":
        wide = call.x.astype(jnp.float32)
        return tuple(jnp.sum(wide * matrix.astype(jnp.float32), axis=1)[None] for matrix in call.matrices())
    precision = "highest" if call.x.dtype == jnp.float32 else None
    return tuple(
        jnp.matmul(call.x, matrix.astype(call.x.dtype).T, precision=precision, preferred_element_type=jnp.float32)
        for matrix in call.matrices()
    )

"""Selection through XLA: lax.top_k (lowest index first among equals) and two gathers."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.select.call import SelectCall


def gather(array: jax.Array, index: jax.Array) -> jax.Array:
    """array [B, S, K, D] at index [B, count, K] -> [B, count, K, D]; every index is in bounds."""
    return jnp.take_along_axis(array, index[..., None], axis=1, mode="promise_in_bounds")


def xla(call: SelectCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """index [B, count, K], k_sel and v_sel [B, count, K, D]."""
    # XLA's order puts -0.0 before 0.0; here they are equal.
    scores = jnp.where(call.scores == 0, 0.0, call.scores)
    _, index = lax.top_k(jnp.moveaxis(scores, 1, 2), call.count)
    index = jnp.moveaxis(index, 1, 2).astype(jnp.int32)
    return index, gather(call.k, index), gather(call.v, index)

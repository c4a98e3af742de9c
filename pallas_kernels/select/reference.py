"""The definition: a stable descending sort."""

import jax
import jax.numpy as jnp

from pallas_kernels.select.call import SelectCall
from pallas_kernels.select.xla import gather


def reference(call: SelectCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """index [B, count, K], k_sel and v_sel [B, count, K, D]."""
    index = jnp.argsort(call.scores, axis=1, stable=True, descending=True)[:, : call.count].astype(jnp.int32)
    return index, gather(call.k, index), gather(call.v, index)

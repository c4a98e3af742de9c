"""Two matrix products in the input's dtype with float32 accumulation, through XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.retaining_score.call import ScoreCall, pool_and_mask


def xla(call: ScoreCall) -> jax.Array:
    """Scores float32 [B, S, K]."""
    precision = "highest" if call.w2.dtype == jnp.float32 else None
    hidden = call.data
    if call.w1 is not None:
        # In the input's dtype: a float32 [S, F] would travel to device memory and back.
        hidden = jnp.matmul(call.data, call.w1, precision=precision)
    activated = jax.nn.silu(hidden.astype(jnp.float32)).astype(call.w2.dtype)
    raw = jnp.matmul(activated, call.w2, precision=precision, preferred_element_type=jnp.float32)
    return pool_and_mask(raw, call.limits, call.pool)

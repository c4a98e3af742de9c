"""The definition, in float32 throughout."""

import jax
import jax.numpy as jnp

from pallas_kernels.retaining_score.call import ScoreCall, pool_and_mask


def reference(call: ScoreCall) -> jax.Array:
    """Scores float32 [B, S, K]."""
    hidden = call.data
    if call.w1 is not None:
        hidden = jnp.matmul(call.data.astype(jnp.float32), call.w1.astype(jnp.float32), precision="highest")
    activated = jax.nn.silu(hidden.astype(jnp.float32))
    raw = jnp.matmul(activated, call.w2.astype(jnp.float32), precision="highest")
    return pool_and_mask(raw, call.limits, call.pool)

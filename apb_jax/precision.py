"""How products are multiplied: float32 as float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, which GPUs else round to 10 bits of mantissa (TF32); None for other types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

"""Choosing the next token: greedy, or nucleus sampling with a temperature."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """``temperature`` 0 is greedy; else sample from the fewest tokens with mass ``top_p`` (arXiv 1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"--temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must lie in (0, 1]")

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        """One token per request, int32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1)[:, ::-1]
            before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
            kept = jnp.sum(before < self.top_p, axis=-1, keepdims=True)
            least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

"""Choosing the next token: greedy, or nucleus sampling with a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.errors import UserError
from apb_jax.typed import check_types

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-6, 1e6


@dataclass(frozen=True)
class Sampler:
    """``temperature`` 0 is greedy; else sample from the fewest tokens with mass ``top_p`` (arXiv 1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature is {self.temperature}; it must be 0 (greedy) or more, and finite")
        if 0 < self.temperature < LEAST_TEMPERATURE or self.temperature > LARGEST_TEMPERATURE:
            nearest = 0 if self.temperature < 1 else LARGEST_TEMPERATURE
            raise UserError(
                f"--temperature is {self.temperature}; it must be 0 (greedy) or lie in {LEAST_TEMPERATURE:g}.."
                f"{LARGEST_TEMPERATURE:g}, which float32 can divide by; nearest legal choice: {nearest:g}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must lie in (0, 1]")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken: what a program is compiled for."""
        return self.temperature == 0

    @property
    def settings(self) -> tuple[float, float]:
        """(temperature, top_p): arguments of a program, so that other settings are not another program."""
        return float(self.temperature), float(self.top_p)

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        """One token per request, int32."""
        return greedy(logits) if self.greedy else draw(logits, key, *map(jnp.float32, self.settings))


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The best token of each request, int32."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(
    logits: Float[Array, "B V"], key: jax.Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, " B"]:
    """A token of each request at ``temperature`` > 0 from the fewest tokens with mass ``top_p``, int32."""
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # finite at any temperature
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    share = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.sum(jnp.cumsum(share, axis=-1) - share < top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
    chosen = jnp.where((logits < least) & (top_p < 1), -jnp.inf, logits)
    return jax.random.categorical(key, chosen, axis=-1).astype(jnp.int32)

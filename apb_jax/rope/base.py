"""Rotary position embedding (RoPE, arXiv 2104.09864): what a rule is, its table of angles, the half-split rotation."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.errors import UserError
from apb_jax.typed import check_types


@dataclass(frozen=True)
class Rope(abc.ABC):
    """A rule that turns a head dimension into rotation frequencies."""

    theta: float
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 < self.theta < math.inf:  # false for NaN too
            raise UserError(f"rope theta is {self.theta}; it must be finite and exceed 1 (Llama 3: 500000)")

    def base_frequencies(self, head_dim: int) -> np.ndarray:
        """theta^(-2k/D) for k < D/2; float32 [D/2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return (1.0 / np.power(np.float32(self.theta), exponent)).astype(np.float32)

    @abc.abstractmethod
    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Radians per position, float32 [D/2]."""

    @property
    def attention_factor(self) -> float:
        """Multiplier of cos and sin."""
        return 1.0

    def positions(self, stated: int) -> int:
        """Positions of a model whose ``max_position_embeddings`` states ``stated``."""
        return stated

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` of a transformers config."""


def check_factor(kind: str, factor: float) -> None:
    """Refuse a stretching factor that is no number of at least 1."""
    if not 1 <= factor < math.inf:
        raise UserError(f"factor of rope type {kind!r} is {factor}; it must be finite and at least 1 (1: no change)")


def check_original(kind: str, positions: int) -> None:
    """Refuse a model without positions before it was stretched."""
    if positions < 1:
        raise UserError(
            f"original_max_position_embeddings of rope type {kind!r} is {positions}; "
            "it must be at least 1 (Llama 3: 8192)"
        )


def rope_table(
    rope: Rope, head_dim: int, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S Dhalf"], Float[Array, "B S Dhalf"]]:
    """cos and sin of every position, float32, already times the attention factor."""
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.inv_freq(head_dim))
    factor = jnp.float32(rope.attention_factor)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B S heads D"], cos: Float[Array, "B S Dhalf"], sin: Float[Array, "B S Dhalf"]
) -> Float[Array, "B S heads D"]:
    """Half-split rotation in float32, returned in the dtype of ``x``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

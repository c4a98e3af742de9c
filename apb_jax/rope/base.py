"""Rotary position embedding: the frequency rules of the supported models, and the half-split rotation.

Sources: RoPE (arXiv 2104.09864); the llama3 rule of Llama 3.1 and YaRN (arXiv 2309.00071) as transformers applies them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.errors import UserError


@dataclass(frozen=True)
class Rope(abc.ABC):
    """A rule that turns a head dimension into rotation frequencies."""

    theta: float
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise UserError(f"rope theta is {self.theta}; it must exceed 1 (Llama 3: 500000)")

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

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` of a transformers config."""


@dataclass(frozen=True)
class DefaultRope(Rope):
    """Frequencies as in the RoPE paper."""

    kind: ClassVar[str] = "default"

    def inv_freq(self, head_dim: int) -> np.ndarray:
        return self.base_frequencies(head_dim)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": self.kind, "rope_theta": self.theta}


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: long wavelengths are divided by ``factor``, the middle band interpolates."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    kind: ClassVar[str] = "llama3"

    def inv_freq(self, head_dim: int) -> np.ndarray:
        freq = self.base_frequencies(head_dim)
        wavelength = 2 * math.pi / freq
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        middle = (1 - smooth) * freq / self.factor + smooth * freq
        out = np.where(wavelength > self.original_max_positions / self.low_freq_factor, freq / self.factor, middle)
        out = np.where(wavelength < self.original_max_positions / self.high_freq_factor, freq, out)
        return out.astype(np.float32)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": self.kind,
            "rope_theta": self.theta,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN: low frequencies are interpolated, high ones kept, a linear ramp between."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    explicit_attention_factor: float | None = None
    kind: ClassVar[str] = "yarn"

    def inv_freq(self, head_dim: int) -> np.ndarray:
        freq = self.base_frequencies(head_dim)

        def dimension_of(rotations: float) -> float:
            return (
                head_dim
                * math.log(self.original_max_positions / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low = max(math.floor(dimension_of(self.beta_fast)), 0)
        high = min(math.ceil(dimension_of(self.beta_slow)), head_dim - 1)
        span = (high - low) or 0.001  # transformers' guard against an empty ramp
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
        return (ramp * freq / self.factor + (1 - ramp) * freq).astype(np.float32)

    @property
    def attention_factor(self) -> float:
        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def to_hf(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "rope_type": self.kind,
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_positions,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        if self.explicit_attention_factor is not None:
            out["attention_factor"] = self.explicit_attention_factor
        return out


def rope_from_hf(hf: Mapping[str, Any]) -> Rope:
    """Read the rope settings of an HF ``config.json`` (``rope_parameters`` or ``rope_theta`` + ``rope_scaling``)."""
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(settings.pop("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    try:
        if kind == "default":
            rope: Rope = DefaultRope(theta)
        elif kind == "llama3":
            rope = Llama3Rope(
                theta,
                factor=float(settings.pop("factor")),
                low_freq_factor=float(settings.pop("low_freq_factor")),
                high_freq_factor=float(settings.pop("high_freq_factor")),
                original_max_positions=int(settings.pop("original_max_position_embeddings")),
            )
        elif kind == "yarn":
            attention_factor = settings.pop("attention_factor", None)
            rope = YarnRope(
                theta,
                factor=float(settings.pop("factor")),
                original_max_positions=int(
                    settings.pop("original_max_position_embeddings", None) or hf["max_position_embeddings"]
                ),
                beta_fast=float(settings.pop("beta_fast", None) or 32),
                beta_slow=float(settings.pop("beta_slow", None) or 1),
                explicit_attention_factor=None if attention_factor is None else float(attention_factor),
            )
        else:
            raise UserError(f"rope type {kind!r} is not supported; supported: default, llama3, yarn")
    except KeyError as missing:
        raise UserError(f"rope type {kind!r} needs the setting {missing} in config.json") from missing
    if settings:
        raise UserError(f"unknown settings {sorted(settings)} for rope type {kind!r} in config.json")
    return rope


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

"""The rule of Llama 3.1, as Meta's and transformers' code apply it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from apb_jax.errors import UserError
from apb_jax.rope.base import Rope, check_factor, check_original


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: long wavelengths are divided by ``factor``, the middle band interpolates."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    kind: ClassVar[str] = "llama3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor(self.kind, self.factor)
        check_original(self.kind, self.original_max_positions)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise UserError(
                f"low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor} of rope type "
                f"'llama3' must satisfy 0 < low < high (Llama 3.1: 1 and 4)"
            )

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

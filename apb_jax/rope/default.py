"""The rule of the RoPE paper (arXiv 2104.09864), and layers without positions (NoPE, arXiv 2305.19466)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from apb_jax.rope.base import Rope


@dataclass(frozen=True)
class DefaultRope(Rope):
    """Frequencies as in the RoPE paper."""

    kind: ClassVar[str] = "default"

    def inv_freq(self, head_dim: int) -> np.ndarray:
        return self.base_frequencies(head_dim)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": self.kind, "rope_theta": self.theta}


@dataclass(frozen=True)
class NoRope(DefaultRope):
    """No rotation: every angle is 0, at whatever position. For single layers; a config names it layer by layer."""

    theta: float = 10000.0
    kind: ClassVar[str] = "none"

    def inv_freq(self, head_dim: int) -> np.ndarray:
        return np.zeros(head_dim // 2, np.float32)

"""Position interpolation (arXiv 2306.15595): every position divided by a factor. Llama 2's long variants use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from apb_jax.rope.base import Rope, check_factor


@dataclass(frozen=True)
class LinearRope(Rope):
    """All frequencies divided by ``factor``."""

    factor: float
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor(self.kind, self.factor)

    def inv_freq(self, head_dim: int) -> np.ndarray:
        return (self.base_frequencies(head_dim) / np.float32(self.factor)).astype(np.float32)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": self.kind, "rope_theta": self.theta, "factor": self.factor}

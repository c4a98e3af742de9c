"""YaRN (arXiv 2309.00071), as transformers applies it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from apb_jax.errors import UserError
from apb_jax.rope.base import Rope, check_factor, check_original


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN: low frequencies are interpolated, high ones kept, a linear ramp between."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    explicit_attention_factor: float | None = None
    kind: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor(self.kind, self.factor)
        check_original(self.kind, self.original_max_positions)
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise UserError(
                f"beta_fast {self.beta_fast} and beta_slow {self.beta_slow} of rope type 'yarn' must satisfy "
                "0 < slow <= fast (the paper: 32 and 1)"
            )
        given = self.explicit_attention_factor
        if given is not None and not 0 < given < math.inf:
            raise UserError(f"attention_factor of rope type 'yarn' is {given}; it must be finite and positive")

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

    def positions(self, stated: int) -> int:
        """``factor`` times the original ones, also where ``max_position_embeddings`` was left at those.

        That is how Qwen2.5's model cards switch YaRN on: 131,072 positions from 32,768 and a factor of 4.
        """
        return max(stated, int(self.factor * self.original_max_positions))

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

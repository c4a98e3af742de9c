"""STRING: shifted rotary positions (arXiv 2410.18745; HKUNLP/STRING). Training-free, composes with any base rope.

A key at distance ``offset`` or more is treated as if it were ``offset - local`` tokens nearer, so that far keys reuse
the small distances that training saw often. Only the query's rotation changes: keys are cached at their own positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from apb_jax.errors import UserError
from apb_jax.rope.base import Rope


@dataclass(frozen=True)
class StringRope(Rope):
    """``base``'s frequencies with distance d >= ``offset`` seen as d - ``offset`` + ``local``.

    ``factor`` multiplies cos and sin of queries and keys on top of the base's own. ``border_twice``: in prefill, the
    key at distance exactly ``offset`` counts in both parts, as in the released code; decoding counts it once, as far.
    """

    base: Rope
    offset: int
    local: int = 128
    factor: float = 0.1 * math.log(2) + 1.0
    border_twice: bool = True
    kind: ClassVar[str] = "string"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, StringRope):
            raise UserError("a string rope cannot stand on another one")
        if self.offset < 1:
            raise UserError(
                f"string offset is {self.offset} tokens; it must be at least 1 (the paper: 1/3 of the length)"
            )
        if not 0 <= self.local <= self.offset:
            raise UserError(
                f"string local is {self.local} tokens; it must lie in 0..{self.offset}, the offset "
                f"(nearest legal choice: {min(max(self.local, 0), self.offset)})"
            )

    def inv_freq(self, head_dim: int) -> np.ndarray:
        return self.base.inv_freq(head_dim)

    @property
    def attention_factor(self) -> float:
        return self.base.attention_factor * self.factor

    @property
    def shift(self) -> int:
        """What is added to a query's position where it looks at far keys (never positive)."""
        return self.local - self.offset

    def to_hf(self) -> dict[str, Any]:
        """The base's settings: STRING is a way to run a checkpoint, not part of it."""
        return self.base.to_hf()

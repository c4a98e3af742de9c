"""One validated call of select_topk."""

from dataclasses import dataclass

import jax

from pallas_kernels.errors import KernelInputError


@dataclass(frozen=True)
class SelectCall:
    """scores [B, S, K]; k and v [B, S, K, D]; how many to keep per KV head."""

    scores: jax.Array
    k: jax.Array
    v: jax.Array
    count: int

    def __post_init__(self) -> None:
        if self.scores.ndim != 3 or self.k.ndim != 4 or self.k.shape[:3] != self.scores.shape:
            raise KernelInputError(
                f"scores {self.scores.shape} and k {self.k.shape} must be [B, S, K] and [B, S, K, D]"
            )
        if self.v.shape != self.k.shape or self.v.dtype != self.k.dtype:
            raise KernelInputError(f"k {self.k.shape} and v {self.v.shape} must agree in shape and dtype")
        if not 1 <= self.count <= self.scores.shape[1]:
            raise KernelInputError(f"count is {self.count}; it must lie between 1 and S = {self.scores.shape[1]}")

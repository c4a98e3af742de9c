"""One validated call of retaining_score, and what every implementation does after the two products."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError

MASKED = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class ScoreCall:
    """``data``: x [B, S, W] with w1 [W, F], or hidden [B, S, F] without w1 (the folded form).

    w2 [F, K]; the row marks are int32 [B].
    """

    data: jax.Array
    w1: jax.Array | None
    w2: jax.Array
    dead_rows: jax.Array
    masked_rows: jax.Array
    valid_rows: jax.Array
    pool: int

    def __post_init__(self) -> None:
        data = self.data
        if data.ndim != 3:
            raise KernelInputError(f"x or hidden has shape {data.shape}; it must have three axes [B, S, width]")
        width = data.shape[-1]
        if self.w1 is not None:
            if self.w1.ndim != 2 or self.w1.shape[0] != width:
                raise KernelInputError(f"w1 has shape {self.w1.shape}; it must be [{width}, F]")
            width = self.w1.shape[1]
        if self.w2.ndim != 2 or self.w2.shape[0] != width:
            raise KernelInputError(f"w2 has shape {self.w2.shape}; it must be [{width}, K]")
        if self.pool < 1 or self.pool % 2 == 0:
            raise KernelInputError(f"pool is {self.pool}; it must be odd and at least 1, for example 5")
        if len(dtypes := {a.dtype.name for a in (data, self.w1, self.w2) if a is not None}) > 1:
            raise KernelInputError(f"x, w1, w2 have dtypes {sorted(dtypes)}; they must agree")

    @property
    def marks(self) -> dict[str, Any]:
        """What `pool_and_mask` needs to know."""
        return {
            "dead_rows": self.dead_rows,
            "masked_rows": self.masked_rows,
            "valid_rows": self.valid_rows,
            "pool": self.pool,
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the scores: (B, S, K)."""
        return self.data.shape[0], self.data.shape[1], self.w2.shape[1]


def make_call(x, w1, w2, hidden, dead_rows, masked_rows, valid_rows, pool) -> ScoreCall:
    """Validate, bring the row marks to int32 [B], and let all arrays vary over the same mesh axes."""
    if (x is None) == (hidden is None):
        raise KernelInputError("give either x with w1, or hidden; not both and not neither")
    if (x is None) != (w1 is None):
        raise KernelInputError("w1 goes with x; the folded form (hidden) has no w1")
    data = hidden if x is None else x
    marks = []
    for name, mark in (("dead_rows", dead_rows), ("masked_rows", masked_rows), ("valid_rows", valid_rows)):
        mark = jnp.asarray(mark, jnp.int32)
        if mark.shape not in ((), data.shape[:1]):
            raise KernelInputError(f"{name} has shape {mark.shape}; it must be () or ({data.shape[0]},)")
        marks.append(jnp.broadcast_to(mark, data.shape[:1]))
    data, w1, w2, (dead, masked, valid) = vary_together((data, w1, w2, marks))
    return ScoreCall(data, w1, w2, dead_rows=dead, masked_rows=masked, valid_rows=valid, pool=pool)


def pool_and_mask(
    raw: jax.Array, *, dead_rows: jax.Array | int, masked_rows: jax.Array | int, valid_rows: jax.Array | int, pool: int
) -> jax.Array:
    """raw float32 [B, S, K] -> scores: existing rows pooled by maximum, then the masked rows put last.

    The row marks are ints, int32 scalars or int32 [B], with the meaning they have in `retaining_score`.
    """
    row = jnp.arange(raw.shape[1], dtype=jnp.int32)
    marks = (
        jnp.broadcast_to(jnp.asarray(mark, jnp.int32), raw.shape[:1]) for mark in (dead_rows, masked_rows, valid_rows)
    )
    dead, masked, valid = (mark[:, None] for mark in marks)
    exists = ((row >= dead) & (row < valid))[..., None]
    raw = jnp.where(exists, raw, -jnp.inf)
    half = pool // 2
    padded = jnp.pad(raw, ((0, 0), (half, half), (0, 0)), constant_values=-jnp.inf)
    pooled = raw
    for shift in range(pool):
        pooled = jnp.maximum(pooled, lax.slice_in_dim(padded, shift, shift + raw.shape[1], axis=1))
    scores = jnp.where((row < masked)[..., None], MASKED, pooled)
    return jnp.where(exists, scores, -jnp.inf)

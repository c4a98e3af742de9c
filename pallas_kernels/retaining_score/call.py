"""One validated call of retaining_score, and what every implementation does after the two products."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError

MASKED = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowLimits:
    """Rows of the scores, each an int, an int32 scalar or int32 [B].

    Rows before ``dead`` and from ``valid`` on do not exist: they never enter the pooling and score -inf. Existing rows
    before ``masked`` take part in the pooling and then score finfo(float32).min.
    """

    dead: jax.Array | int
    masked: jax.Array | int
    valid: jax.Array | int

    def per_request(self, batch: int) -> "RowLimits":
        """The same limits as int32 [B]."""

        def spread(name: str) -> jax.Array:
            limit = jnp.asarray(getattr(self, name), jnp.int32)
            if limit.shape not in ((), (batch,)):
                raise KernelInputError(f"limit {name!r} has shape {limit.shape}; it must be () or ({batch},)")
            return jnp.broadcast_to(limit, (batch,))

        return RowLimits(*map(spread, ("dead", "masked", "valid")))


@dataclass(frozen=True)
class ScoreCall:
    """``data``: x [B, S, W] with w1 [W, F], or hidden [B, S, F] without w1 (the folded form).

    w2 [F, K]; the row limits are int32 [B].
    """

    data: jax.Array
    w1: jax.Array | None
    w2: jax.Array
    limits: RowLimits
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
    def shape(self) -> tuple[int, int, int]:
        """Of the scores: (B, S, K)."""
        return self.data.shape[0], self.data.shape[1], self.w2.shape[1]


def make_call(x, w1, w2, hidden, limits, pool) -> ScoreCall:
    """Validate, bring the row limits to int32 [B], and let all arrays vary over the same mesh axes."""
    if (x is None) == (hidden is None):
        raise KernelInputError("give either x with w1, or hidden; not both and not neither")
    if (x is None) != (w1 is None):
        raise KernelInputError("w1 goes with x; the folded form (hidden) has no w1")
    data = hidden if x is None else x
    data, w1, w2, limits = vary_together((data, w1, w2, limits.per_request(data.shape[0])))
    return ScoreCall(data, w1, w2, limits, pool)


def pool_and_mask(raw: jax.Array, limits: RowLimits, pool: int) -> jax.Array:
    """raw float32 [B, S, K] -> scores: existing rows pooled by maximum over ``pool`` of them, masked ones last."""
    row = jnp.arange(raw.shape[1], dtype=jnp.int32)
    limits = limits.per_request(raw.shape[0])
    dead, masked, valid = (jnp.asarray(limit)[:, None] for limit in (limits.dead, limits.masked, limits.valid))
    exists = ((row >= dead) & (row < valid))[..., None]
    raw = jnp.where(exists, raw, -jnp.inf)
    half = pool // 2
    padded = jnp.pad(raw, ((0, 0), (half, half), (0, 0)), constant_values=-jnp.inf)
    pooled = raw
    for shift in range(pool):
        pooled = jnp.maximum(pooled, lax.slice_in_dim(padded, shift, shift + raw.shape[1], axis=1))
    scores = jnp.where((row < masked)[..., None], MASKED, pooled)
    return jnp.where(exists, scores, -jnp.inf)

"""A training-free scorer that knows no question: Expected Attention (Devoto et al., arXiv 2510.00636).

Queries before RoPE are taken as a normal distribution whose mean and covariance are those of the block's own rows.
What a key can expect of a query behind the document then has a closed form, with RoPE averaged over ``FUTURE``
positions. The paper's fields: ``n_future_positions`` is ``FUTURE``; ``n_sink``: rows left out of the statistics, here
``SINK`` on every block; ``use_covariance`` and ``use_vnorm`` are on; ``epsilon`` is ``EPSILON``.
Otherwise than in the paper each shard knows the queries of its own block only, and mass is relative to that block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FUTURE = 512
SINK = 4
EPSILON = 0.02


def expected_scores(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B C K D"],
    v: Float[Array, "B C K D"],
    *,
    cos: Float[Array, "B F Dhalf"],
    sin: Float[Array, "B F Dhalf"],
    block_rows: Int[Array, " B"],
) -> Float[Array, "B C K"]:
    """Expected attention mass of every block key times the norm of its value, averaged over the heads of a group.

    ``q``: block rows before RoPE; ``k``: after RoPE; ``cos``/``sin``: rotations of the F future positions. Only the
    first ``block_rows`` rows exist; the others get 0.
    """
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    exists = jnp.arange(rows, dtype=jnp.int32)[None] < block_rows[:, None]
    counted = exists & (jnp.arange(rows, dtype=jnp.int32)[None] >= jnp.minimum(SINK, block_rows - 1)[:, None])
    weight = counted.astype(jnp.float32)
    weight /= jnp.sum(weight, axis=1, keepdims=True)
    asked = q.astype(jnp.float32)
    mean = jnp.einsum("bc,bchd->bhd", weight, asked)
    centred = (asked - mean[:, None]) * jnp.sqrt(weight)[..., None, None]
    covariance = jnp.einsum("bchd,bche->bhde", centred, centred)
    turn = mean_rotation(cos, sin)
    mean = jnp.einsum("bde,bhe->bhd", turn, mean).reshape(batch, groups, heads // groups, dim)
    covariance = jnp.einsum("bde,bhef,bgf->bhdg", turn, covariance, turn)
    covariance = covariance.reshape(batch, groups, heads // groups, dim, dim)
    keys = k.astype(jnp.float32)
    logits = jnp.einsum("bckd,bkgd->bkgc", keys, mean) * dim**-0.5
    spread = jnp.einsum("bckd,bkgde->bckge", keys, covariance)
    logits += jnp.einsum("bckge,bcke->bkgc", spread, keys) / (2 * dim)
    mass = jax.nn.softmax(jnp.where(exists[:, None, None], logits, -jnp.inf), axis=-1).mean(axis=2).swapaxes(1, 2)
    norm = jnp.linalg.norm(v.astype(jnp.float32), axis=-1)
    return jnp.where(exists[..., None], (mass + EPSILON) * norm, 0.0)


def mean_rotation(cos: Float[Array, "B F Dhalf"], sin: Float[Array, "B F Dhalf"]) -> Float[Array, "B D D"]:
    """The mean over positions of RoPE as a matrix: x rotated is this times x (halves as in ``rope.base.rotate``)."""
    c, s = (jax.vmap(jnp.diag)(jnp.mean(x.astype(jnp.float32), axis=1)) for x in (cos, sin))
    return jnp.concatenate([jnp.concatenate([c, -s], axis=2), jnp.concatenate([s, c], axis=2)], axis=1)

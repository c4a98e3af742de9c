"""The loss of retaining heads and the measure of how well they select (Locret, ``train/train.py``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMOOTHING = 0.0025
"""Weight of the difference between neighbouring scores (the paper's alpha)."""
TOP_SHARE = 0.1
"""The overlap metric compares the best tenth of the tokens."""


def smooth_l1(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """0.5 x^2 within 1 of zero, |x| - 0.5 outside (beta = 1)."""
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * size * size, size - 0.5)


def retaining_loss(
    scores: Float[Array, "L K T"], labels: Float[Array, "L K T"], tokens: Int[Array, ""], smoothing: float = SMOOTHING
) -> Float[Array, ""]:
    """Mean over layers, heads and the first ``tokens`` keys of SmoothL1, plus ``smoothing`` times the squared steps.

    The steps are averaged over heads and neighbouring pairs and summed over layers.
    """
    key = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    error = jnp.where(key < tokens, smooth_l1(jnp.where(key < tokens, scores - labels, 0.0)), 0.0)
    regression = jnp.sum(error) / (scores.shape[0] * scores.shape[1] * tokens.astype(jnp.float32))
    step = jnp.where(key[1:] < tokens, scores[..., 1:] - scores[..., :-1], 0.0)
    pairs = jnp.maximum(tokens.astype(jnp.float32) - 1.0, 1.0)
    roughness = jnp.sum(jnp.sum(step * step, axis=(1, 2)) / (scores.shape[1] * pairs))
    return regression + smoothing * roughness


def top_overlap(
    scores: Float[Array, "L K T"], labels: Float[Array, "L K T"], tokens: Int[Array, ""], share: float = TOP_SHARE
) -> Float[Array, "L K"]:
    """Share of the ``share`` best keys by label that are also among the best by score; 0..1 per head."""
    key = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    count = jnp.maximum(1, (tokens.astype(jnp.float32) * share).astype(jnp.int32))

    def best(x: Float[Array, "L K T"]) -> Float[Array, "L K T"]:
        order = jnp.argsort(jnp.where(key < tokens, -x, jnp.inf), axis=-1, stable=True)
        return jnp.argsort(order, axis=-1, stable=True) < count

    both = best(scores) & best(labels)
    return jnp.sum(both, axis=-1).astype(jnp.float32) / count.astype(jnp.float32)


def layer_scores(heads: object, q: jax.Array, k: jax.Array, v: jax.Array) -> Float[Array, "L K T"]:
    """Scores of all layers: ``heads`` is a RetainingHead whose leaves have a leading layer axis."""

    def one(head: object, *qkv: jax.Array) -> jax.Array:
        return head.scores(*qkv)[0].T  # type: ignore[attr-defined]

    return jax.vmap(one)(heads, q, k, v)

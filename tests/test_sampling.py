"""Sampling by definition: shares of a softmax at a temperature, and the fewest tokens that hold the mass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apb_jax.sampling import Sampler, draw, greedy

SHARES = np.float32([0.5, 0.25, 0.15, 0.1])
DRAWS = 4000


def frequencies(temperature: float, top_p: float) -> np.ndarray:
    """How often each of four tokens comes; the last of them the likeliest."""
    logits = jnp.log(SHARES[::-1])[None]
    keys = jax.random.split(jax.random.key(0), DRAWS)
    taken = jax.vmap(lambda key: draw(logits, key, jnp.float32(temperature), jnp.float32(top_p)))(keys)
    return np.bincount(np.asarray(taken).ravel(), minlength=4)[::-1] / DRAWS


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, 4), (0.95, 4), (0.89, 3), (0.76, 3), (0.74, 2), (0.51, 2), (0.49, 1), (1e-6, 1)],
)
def test_a_nucleus_is_the_fewest_tokens_that_hold_the_mass(top_p: float, kept: int) -> None:
    want = np.where(np.arange(4) < kept, SHARES, 0)
    np.testing.assert_allclose(frequencies(1.0, top_p), want / want.sum(), atol=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    want = SHARES ** (1 / temperature)
    np.testing.assert_allclose(frequencies(temperature, 1.0), want / want.sum(), atol=0.03)


def test_requests_are_drawn_apart() -> None:
    logits = jnp.zeros((64, 16))
    taken = np.asarray(Sampler(1.0)(logits, jax.random.key(0)))
    assert len(set(taken.tolist())) > 8
    assert greedy(jnp.asarray([[0.0, 2.0, 1.0]])).tolist() == [1]

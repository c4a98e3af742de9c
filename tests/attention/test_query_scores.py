"""The query's scores by their definition, and how much mass a selection stops at."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from apb_jax.attention.query_scores import query_scores
from apb_jax.attention.xattention import select_blocks
from apb_jax.rope.base import rope_table, rotate
from apb_jax.rope.default import DefaultRope

HEADS, KV_HEADS, DIM, ANCHOR, KEYS = 4, 2, 8, 20, 24


@pytest.mark.parametrize("query_tokens", [[9, 6], [3, 9]])  # as long as the window or longer, and shorter
def test_scores_are_the_mass_of_the_querys_last_rows(query_tokens: list[int]) -> None:
    """Rows at the end of the query embedded at 5, each at its true position; keys that do not exist get nothing."""
    rng = np.random.default_rng(0)
    window, query_at, block_rows = 6, 5, [24, 17]
    q = rng.normal(size=(2, ANCHOR, HEADS, DIM)).astype(np.float32)
    k = rng.normal(size=(2, KEYS, KV_HEADS, DIM)).astype(np.float32)
    behind = np.asarray([100, 60])
    places = behind[:, None] - window + np.arange(window)
    cos, sin = rope_table(DefaultRope(100.0), DIM, jnp.asarray(places, jnp.int32))
    got = query_scores(
        jnp.asarray(q), jnp.asarray(k), query_at=query_at, query_tokens=jnp.asarray(query_tokens, jnp.int32),
        cos=cos, sin=sin, block_rows=jnp.asarray(block_rows, jnp.int32),
    )  # fmt: skip
    want = np.zeros((2, KEYS, KV_HEADS))
    for b in range(2):
        for t in range(min(window, query_tokens[b])):  # t rows before the query's last one
            row = q[b : b + 1, query_at + query_tokens[b] - 1 - t][:, None]
            at = rope_table(DefaultRope(100.0), DIM, jnp.asarray([[behind[b] - 1 - t]], jnp.int32))
            asked = np.asarray(rotate(jnp.asarray(row), *at))[0, 0]
            for h in range(HEADS):
                logits = k[b, : block_rows[b], h // (HEADS // KV_HEADS)] @ asked[h] / DIM**0.5
                mass = np.exp(logits - logits.max())
                want[b, : block_rows[b], h // (HEADS // KV_HEADS)] += mass / mass.sum()
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("threshold", "kept"), [(0.25, 1), (0.5, 1), (0.5625, 2), (0.75, 2), (0.875, 3), (1.0, 4)])
def test_a_selection_stops_where_it_holds_the_mass(threshold: float, kept: int) -> None:
    """Shares that binary fractions hold exactly: a block too many would be seen."""
    mass = jnp.asarray([0.125, 0.5, 0.125, 0.25]).reshape(1, 1, 1, 4)
    none, every = jnp.zeros((1, 4), bool), jnp.ones((1, 4), bool)
    chosen = select_blocks(mass, none, every, jnp.asarray([threshold]))[0, 0, 0]
    assert chosen.tolist() == [place in (1, 3, 0, 2)[:kept] for place in range(4)]

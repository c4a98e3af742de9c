"""STRING through the kernels, on rows that follow each other, against the definition in tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apb_jax.attention.attend import Keys, Queries, attend, project
from apb_jax.attention.consecutive import causal
from apb_jax.attention.inputs import LayerInputs
from apb_jax.rope.base import rope_table
from apb_jax.rope.default import DefaultRope
from apb_jax.rope.string import StringRope
from pallas_kernels.flash_attention import RowSegment


def inputs(rows: int, rope: StringRope) -> tuple[Queries, Keys]:
    """Two requests of two KV heads with two query heads each, at positions from 0."""
    keys = jax.random.split(jax.random.key(rows), 3)
    q, k, v = (jax.random.normal(key, (2, rows, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    positions = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (2, rows))
    cos, sin = rope_table(rope, 8, positions)
    return project(LayerInputs(q, k, v, cos, sin, jnp.int32(0), None, positions, rope, None))


@pytest.mark.parametrize(
    ("rows", "offset", "local", "twice"),
    [(61, 20, 7, True), (61, 1, 0, True), (61, 61, 3, False), (64, 16, 4, False), (1, 5, 2, True)],
)
def test_string_of_consecutive_rows(rows: int, offset: int, local: int, twice: bool) -> None:
    """Windows that divide the rows or do not, a border before, at and behind the last row."""
    queries, keys = inputs(rows, StringRope(1e4, DefaultRope(1e4), offset, local, border_twice=twice))
    out, lse = jax.jit(causal)(queries, keys)
    tiled = jax.jit(lambda q, k: attend(q, (k,), (RowSegment(rows, start=0, offset=0, end=rows),)))
    want, want_lse = tiled(queries, keys)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_padding_behind_a_row_changes_nothing() -> None:
    queries, keys = inputs(61, StringRope(1e4, DefaultRope(1e4), 20, 7))
    run = jax.jit(causal)
    spoiled = Keys(*(a.at[:, 40:].set(1e3) for a in (keys.k, keys.v)), keys.positions)
    for got, want in zip(run(queries, spoiled), run(queries, keys), strict=True):
        rows = (slice(None), slice(40)) if got.ndim == 4 else (..., slice(40))
        np.testing.assert_array_equal(got[rows], want[rows])

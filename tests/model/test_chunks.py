"""Rows go through the products behind the attention a chunk at a time: the same rows come out, whatever the sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.model import layers


@pytest.mark.parametrize("shape", [(1, 64), (1, 96), (3, 32), (1, 97), (2, 41)])
def test_every_row_once(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no number of chunks divides the rows (prime lengths)."""
    monkeypatch.setattr(layers, "CHUNK_ROWS", 16)
    x = jax.random.normal(jax.random.key(0), (*shape, 8))
    y = jax.random.normal(jax.random.key(1), (*shape, 5))
    most: list[int] = []

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        most.append(x.shape[0] * x.shape[1])
        return x + y.sum(axis=-1, keepdims=True)

    got = layers.over_chunks(function, x, y)
    np.testing.assert_array_equal(got, x + y.sum(axis=-1, keepdims=True))
    assert max(most) <= 16


def test_the_same_answer_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, document, query = random_model(), ids(1, 150), ids(2, 7)
    answers = []
    for rows in (8192, 16):
        monkeypatch.setattr(layers, "CHUNK_ROWS", rows)
        engine = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=2))
        answers.append(engine.generate(document, query, 2, stop_ids=(), logits=True).query_logits)
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5)


def test_memory_in_between_does_not_grow_with_rows() -> None:
    """The compiler's temporaries of one MLP over many rows are those of a chunk."""
    weight = jnp.zeros((16, 4096))

    def mlp(x: jax.Array) -> jax.Array:
        return x + (jax.nn.silu(x @ weight) @ weight.T)

    def temporaries(rows: int) -> int:
        compiled = (
            jax.jit(lambda x: layers.over_chunks(mlp, x), donate_argnums=0)
            .lower(jax.ShapeDtypeStruct((1, rows, 16), jnp.float32))
            .compile()
        )
        stats = compiled.memory_analysis()
        assert stats is not None
        return int(stats.temp_size_in_bytes)

    assert temporaries(4 * layers.CHUNK_ROWS) < 1.3 * temporaries(2 * layers.CHUNK_ROWS)

"""APB's scorers that know no question, against numpy; and a prefill that does not depend on it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.attention.expected_scores import EPSILON, SINK, expected_scores
from apb_jax.attention.reconstruct_scores import reconstruct_scores
from apb_jax.rope.base import rope_table, rotate
from apb_jax.rope.default import DefaultRope

ROWS, REAL, HEADS, GROUPS, DIM = 23, 19, 4, 2, 8
ROPE = DefaultRope(10000.0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rows(garbage: float = 0.0) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """q, k, v of which REAL rows exist."""
    rng = np.random.default_rng(3)
    out = [rng.normal(size=(1, ROWS, n, DIM)).astype(np.float32) for n in (HEADS, GROUPS, GROUPS)]
    for x in out:
        x[:, REAL:] = garbage
    return tuple(map(jnp.asarray, out))  # type: ignore[return-value]


def table(first: int, count: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    return rope_table(ROPE, DIM, first + jnp.arange(count, dtype=jnp.int32)[None])


REAL_ROWS = jnp.asarray([REAL], jnp.int32)


def test_expected_attention_is_that_of_its_definition() -> None:
    """The mean of exp(q k / sqrt(d)) over a normal distribution of queries, by the moments of rotated queries."""
    q, k, v = rows()
    cos, sin = table(100, 32)
    got = np.asarray(expected_scores(q, k, v, cos=cos, sin=sin, block_rows=REAL_ROWS))[0]
    counted = np.asarray(q, np.float64)[0, SINK:REAL]
    basis = jnp.broadcast_to(jnp.eye(DIM)[None, :, None], (32, DIM, 1, DIM))  # every unit vector at every position
    turned = rotate(basis, *(jnp.broadcast_to(x[0][:, None], (32, DIM, DIM // 2)) for x in (cos, sin)))
    turn = np.asarray(turned, np.float64)[:, :, 0].mean(axis=0).T
    want = np.zeros((REAL, GROUPS))
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        mean, covariance = counted[:, head].mean(0), np.cov(counted[:, head].T, bias=True)
        keys = np.asarray(k, np.float64)[0, :REAL, group]
        spread = np.einsum("cd,de,ce->c", keys, turn @ covariance @ turn.T, keys)
        want[:, group] += softmax(keys @ (turn @ mean) / np.sqrt(DIM) + spread / (2 * DIM)) / (HEADS // GROUPS)
    want = (want + EPSILON) * np.linalg.norm(np.asarray(v)[0, :REAL], axis=-1)
    np.testing.assert_allclose(got[:REAL], want, rtol=2e-5)
    np.testing.assert_array_equal(got[REAL:], 0)


@pytest.mark.parametrize("chunk", [5, 8, 23])
def test_reconstruction_is_the_best_probability_in_a_chunk(chunk: int) -> None:
    q, k, _ = rows()
    cos, sin = table(100, chunk)
    got = np.asarray(reconstruct_scores(q, k, cos=cos, sin=sin, block_rows=REAL_ROWS))[0]
    want = np.zeros((ROWS, GROUPS))
    for first in range(0, REAL, chunk):
        end = min(first + chunk, REAL)
        turned = np.asarray(rotate(q[:, first:end], cos[:, : end - first], sin[:, : end - first]))[0]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            mass = softmax(turned[:, head] @ np.asarray(k)[0, first:end, group].T / np.sqrt(DIM))
            want[first:end, group] = np.maximum(want[first:end, group], mass.max(axis=0))
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_rows_that_do_not_exist_change_nothing() -> None:
    cos, sin = table(100, 8)
    for score in (
        lambda q, k, v: expected_scores(q, k, v, cos=cos, sin=sin, block_rows=REAL_ROWS),
        lambda q, k, v: reconstruct_scores(q, k, cos=cos, sin=sin, block_rows=REAL_ROWS),
    ):
        np.testing.assert_array_equal(np.asarray(score(*rows())), np.asarray(score(*rows(garbage=50.0))))


DOCUMENT, QUESTIONS = ids(1, 251), (ids(2, 9), ids(3, 40))
MESH = apb_jax.make_mesh(sp=4)
MODELS = {True: random_model(), False: random_model(retaining_hidden=None)}


@pytest.mark.parametrize("shared_anchor", [False, True])
@pytest.mark.parametrize("scorer", ["heads", "expected", "reconstruct"])
def test_a_prefill_without_the_question_serves_every_question(scorer: str, shared_anchor: bool) -> None:
    """Bit-equal caches whatever the question, and the answer that an engine made for the other question gives."""
    fields: dict[str, Any] = {"embed_query": False, "scorer": scorer, "shared_anchor": shared_anchor}
    engine = apb_jax.Engine(MODELS[True], apb_jax.APB(24, 16, **fields), MESH)
    one, other = (engine.prefill([engine.prompt(DOCUMENT, question)]) for question in QUESTIONS)
    np.testing.assert_array_equal(np.asarray(one.cache.k), np.asarray(other.cache.k))
    np.testing.assert_array_equal(np.asarray(one.cache.v), np.asarray(other.cache.v))
    assert one.method == apb_jax.APB(24, 16, query_at=0, **fields)
    asked = one.ask(QUESTIONS[1], 4, stop_ids=())
    assert asked.tokens == other.generate(4, stop_ids=())[0].tokens
    assert asked.notes == ("prefilled without the question",)


def test_budgets_do_not_follow_a_question_that_is_not_embedded() -> None:
    engine = apb_jax.Engine(MODELS[True], apb_jax.MethodSpec("apb", {"embed_query": False}), MESH)
    methods = [engine.choose([engine.prompt(DOCUMENT, question)])[0] for question in QUESTIONS]
    assert methods[0] == methods[1]
    assert methods[0].name == "apb"


def test_a_model_without_heads_prefills_without_the_question_too() -> None:
    engine = apb_jax.Engine(MODELS[False], apb_jax.MethodSpec("apb", {"embed_query": False}), MESH)
    method, notes = engine.choose([engine.prompt(DOCUMENT, QUESTIONS[0])])
    assert isinstance(method, apb_jax.APB)
    assert method.scorer == "expected"
    assert notes[0] == "prefilled without the question"
    assert "no retaining heads: keys are scored by Expected Attention" in notes[1]


def test_the_scorers_choose_differently() -> None:
    """So that no two names mean one thing."""
    caches = []
    for scorer in ("heads", "expected", "reconstruct"):
        method = apb_jax.APB(24, 16, embed_query=False, scorer=scorer)
        engine = apb_jax.Engine(MODELS[True], method, MESH)
        caches.append(np.asarray(engine.prefill([engine.prompt(DOCUMENT, QUESTIONS[0])]).cache.k[1]))
    assert not any(np.array_equal(a, b) for a, b in zip(caches, [*caches[1:], caches[0]], strict=True))

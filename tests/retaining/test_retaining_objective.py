"""Loss, labels and overlap against direct transcriptions in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ids, random_model

from apb_jax.attention.inputs import LayerInputs
from apb_jax.retaining.labels import Sample, attention_labels, causal_attention, trace
from apb_jax.retaining.objective import layer_scores, retaining_loss, top_overlap
from apb_jax.retaining.train import initial_heads


def plain_loss(scores: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    """Spec section 8.3 word by word, in float64, one head after the other."""
    layers, heads, _ = scores.shape
    total = 0.0
    for layer in range(layers):
        for head in range(heads):
            error = scores[layer, head] - labels[layer, head]
            total += np.mean([0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in error]) / (layers * heads)
        steps = [(s[1:] - s[:-1]) ** 2 for s in scores[layer]]
        total += alpha * np.mean(np.concatenate(steps))
    return float(total)


@pytest.mark.parametrize("tokens", [2, 7, 11])
def test_loss_equals_the_transcription_and_ignores_padding(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    scores, labels = rng.standard_normal((2, 3, 2, 11)).transpose(0, 1, 2, 3) * 2
    expected = plain_loss(scores[..., :tokens], labels[..., :tokens], 0.3)
    for filler in (0.0, np.nan):
        padded = [x.copy() for x in (scores, labels)]
        for x in padded:
            x[..., tokens:] = filler
        got = retaining_loss(*(jnp.asarray(x, jnp.float32) for x in padded), jnp.int32(tokens), 0.3)
        np.testing.assert_allclose(float(got), expected, rtol=2e-6)


def test_overlap_equals_counting_sets() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.standard_normal((2, 2, 3, 64))
    tokens = 50
    got = np.asarray(top_overlap(jnp.asarray(scores, jnp.float32), jnp.asarray(labels, jnp.float32), jnp.int32(tokens)))
    for layer in range(2):
        for head in range(3):
            best = [set(np.argsort(-x[layer, head, :tokens])[:5].tolist()) for x in (scores, labels)]
            assert got[layer, head] == pytest.approx(len(best[0] & best[1]) / 5)
    same = top_overlap(jnp.asarray(labels, jnp.float32), jnp.asarray(labels, jnp.float32), jnp.int32(tokens))
    assert np.all(np.asarray(same) == 1.0)


def test_labels_are_the_largest_logit_over_group_and_rows() -> None:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((1, 5, 4, 8)).astype(np.float32), rng.standard_normal((1, 6, 2, 8)).astype(np.float32)
    exists = np.asarray([True, True, True, False, False])
    got = np.asarray(attention_labels(jnp.asarray(q), jnp.asarray(k), jnp.asarray(exists)))
    for head in range(2):
        for key in range(6):
            logits = [q[0, i, h] @ k[0, key, head] / 8**0.5 for i in range(3) for h in (2 * head, 2 * head + 1)]
            assert got[0, head, key] == pytest.approx(max(logits), abs=1e-5)


def test_trace_reads_the_frozen_model_and_padding_changes_nothing() -> None:
    loaded = random_model(retaining_hidden=None)
    graph, weights = loaded.graph(), loaded.place(None)
    prompt, answer = 13, 4
    tokens = np.asarray(ids(3, prompt + answer))[None]

    def run(prompt_rows: int, answer_rows: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
        padded = np.full((1, prompt_rows + answer_rows), filler, np.int32)
        padded[:, : prompt + answer] = tokens
        counts = jnp.int32(prompt), jnp.int32(prompt + answer)
        out = trace(graph, weights, Sample(jnp.asarray(padded), *counts, prompt_rows, answer_rows))
        heads = initial_heads(loaded.config, 8, 0)
        scores = layer_scores(heads, out.q, out.k, out.v)
        return np.asarray(out.labels)[..., :prompt], np.asarray(scores)[..., :prompt]

    labels, scores = run(prompt, answer, 0)
    for filler in (0, 7):
        more_labels, more_scores = run(24, 8, filler)
        np.testing.assert_allclose(more_labels, labels, atol=1e-5)
        np.testing.assert_allclose(more_scores, scores, atol=1e-5)

    # The labels once more, from queries and keys recorded by a forward of its own.
    def attend(inputs: LayerInputs, carry: object) -> tuple[jax.Array, object]:
        q, k = inputs.rotated()
        return causal_attention(q, k, inputs.v), (q, k)

    model = loaded.build(0)
    x = model.embed(jnp.asarray(tokens))
    positions = jnp.arange(prompt + answer, dtype=jnp.int32)[None]
    for layer in range(loaded.config.num_layers):
        like = (jnp.zeros((1, prompt + answer, 4, 16)), jnp.zeros((1, prompt + answer, 2, 16)))
        x, (q, k) = model.run_layers(x, positions, attend, like, start=jnp.int32(layer), count=1)
        for head in range(2):
            rows = q[0, prompt:, 2 * head : 2 * head + 2]
            logits = np.einsum("rhd,td->rht", np.asarray(rows), np.asarray(k[0, :prompt, head])) / 4.0
            np.testing.assert_allclose(labels[layer, head], logits.max((0, 1)), atol=2e-5)

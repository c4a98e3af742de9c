"""Streaming's window generation: which tokens of the document a question can see, to the token."""

import functools

import numpy as np
import pytest
from helpers import random_model

import apb_jax
from apb_jax.attention.streaming import Streaming

SINKS, WINDOW, TOKENS = 3, 7, 41
DOCUMENT = [1 + i * 7 % 80 for i in range(TOKENS)]


@functools.cache
def engine() -> apb_jax.Engine:
    """One layer, so that a key knows of no other token than its own."""
    method = Streaming(sink_tokens=SINKS, window_tokens=WINDOW, generation="window")
    return apb_jax.Engine(random_model(num_layers=1), method, apb_jax.make_mesh(sp=1))


def logits(document: list[int]) -> np.ndarray:
    """Of the only token of the question, which stands behind the document."""
    (answer,) = engine().generate([document], [[5]], 1, stop_ids=(), logits=True)
    assert answer.query_logits is not None
    return answer.query_logits[-1]


@pytest.mark.parametrize(
    ("index", "seen"),
    [
        (0, True), (SINKS - 1, True), (SINKS, False),
        (TOKENS - WINDOW - 1, False), (TOKENS - WINDOW, True), (TOKENS - 1, True),
    ],
)  # fmt: skip
def test_sinks_and_window_are_seen_and_nothing_between(index: int, seen: bool) -> None:
    changed = list(DOCUMENT)
    changed[index] = 85
    assert np.array_equal(logits(changed), logits(DOCUMENT)) != seen

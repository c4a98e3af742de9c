"""An answer does not depend on its neighbours: a batch of a long and a short document is both of them alone."""

from __future__ import annotations

from typing import Any

import pytest
from attention.method_cases import CASES, answer, difference, engine_on, method, model
from helpers import ids

import apb_jax
from apb_jax.attention.registry import METHODS, MethodSpec
from apb_jax.batching import common_method, groups
from apb_jax.errors import UserError

TOLERANCE = 2e-5  # float32, logits of order 1
SHORT, QUERY = ids(1, 131), ids(2, 9)
LONG = ids(3, 8 * len(SHORT))
TOGETHER: list[tuple[str, int, Any]] = [
    *((name, *row.inexact) for name, row in CASES.items() if row.inexact and name not in ("starx_sparse", "spava")),
    ("full", 2, {}),
    ("ring", 2, {}),
    ("ulysses", 2, {}),
    ("apb", 4, {"anchor_tokens": 12, "passing_tokens": 4, "scorer": "heads"}),
    ("spava", 4, {"anchor_tokens": 19, "passing_tokens": 8}),
    ("starx_sparse", 2, {"block_tokens": 32, "threshold": 0.5, "stride": 4, "sparse_block": 16}),
]
"""Given hyper-parameters, at which the methods are not full attention."""
BY_NAME = [("apb", 4, {}), ("spava", 4, {}), ("starx_sparse", 2, {"threshold": 0.5, "sparse_block": 16, "stride": 4})]
"""Hyper-parameters that the documents decide."""


def same_as_alone(chosen: Any, sp: int) -> None:
    """Logits, method and notes of each."""
    documents, queries = [LONG[: 8 * 73], SHORT[:73]], [QUERY, QUERY[:6]]
    together = answer(chosen, sp, document=documents, query=queries)
    for one, document, query in zip(together, documents, queries, strict=True):
        alone = answer(chosen, sp, document=document, query=query)
        assert one.method == alone.method
        assert one.notes == alone.notes
        assert difference(one, alone) < TOLERANCE


def test_every_method_is_here() -> None:
    assert {name for name, *_ in TOGETHER} == set(METHODS)


@pytest.mark.parametrize(("name", "sp", "fields"), TOGETHER, ids=lambda value: value if isinstance(value, str) else "")
def test_a_long_neighbour_changes_nothing(name: str, sp: int, fields: dict[str, Any]) -> None:
    same_as_alone(method(name, **fields), sp)


@pytest.mark.parametrize(("name", "sp", "fields"), BY_NAME, ids=lambda value: value if isinstance(value, str) else "")
def test_a_long_neighbour_changes_no_budget(name: str, sp: int, fields: dict[str, Any]) -> None:
    engine = engine_on(model(), sp).with_method(MethodSpec(name, fields))
    prompts = [engine.prompt(document, QUERY) for document in (LONG, SHORT)]
    assert [group.places for group in groups(engine, prompts)] == [(0,), (1,)]
    together = engine.generate([LONG, SHORT], QUERY, 1, stop_ids=(), logits=True)
    for one, document in zip(together, (LONG, SHORT), strict=True):
        alone = engine.generate(document, QUERY, 1, stop_ids=(), logits=True)
        assert (one.method, one.notes) == (alone.method, alone.notes)
        assert difference(one, alone) < TOLERANCE


def test_a_document_that_cannot_be_sharded_falls_back_alone() -> None:
    engine = engine_on(model(), 4).with_method(method("apb", anchor_tokens=48, passing_tokens=16))
    heard: list[tuple[int, list[int]]] = []
    options: Any = {"stop_ids": (), "logits": True}
    together = engine.generate(
        [SHORT, LONG, SHORT[:64]], QUERY, 2, on_tokens=lambda request, fresh: heard.append((request, fresh)), **options
    )
    assert [one.method.name for one in together] == ["full", "apb", "full"]
    assert "of its block of 33" in together[0].notes[0]
    assert together[1].notes == ()
    assert "of its block of 16" in together[2].notes[0]
    for one, document in zip(together, (SHORT, LONG, SHORT[:64]), strict=True):
        assert difference(one, engine.generate(document, QUERY, 2, **options)) < TOLERANCE
    for place, one in enumerate(together):  # each request is told its own tokens
        assert [token for request, fresh in heard for token in fresh if request == place] == one.tokens


def test_requests_of_one_method_go_through_the_layers_together() -> None:
    engine = engine_on(model(), 2).with_method("full")
    prompts = [engine.prompt(document, QUERY) for document in (SHORT, LONG, SHORT)]
    (group,) = groups(engine, prompts)
    assert group.places == (0, 1, 2)
    near = engine.with_method("apb")
    prompts = [near.prompt(ids(seed, length), QUERY) for seed, length in ((1, 500), (2, 1040), (3, 505))]
    assert [group.places for group in groups(near, prompts)] == [(0, 2), (1,)]


def test_a_session_is_of_one_method() -> None:
    engine = engine_on(model(), 2).with_method("apb")
    prompts = [engine.prompt(document, QUERY) for document in (LONG, SHORT)]
    with pytest.raises(UserError, match=r"number 0: APB\(.*; number 1: APB\(.*prefill each group apart"):
        engine.prefill(prompts)
    chosen, notes = common_method(engine, prompts[:1] * 2)
    assert isinstance(chosen, apb_jax.APB)
    assert len(notes) == len(set(notes))

"""A session is asked often: answers are independent, stop where they should, and cost only the steps that ran."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.errors import UserError
from apb_jax.sampling import Sampler

DOCUMENT, QUERIES = ids(1, 251), [ids(2, 9), ids(3, 5), ids(4, 12)]


@pytest.fixture(scope="module")
def engine() -> apb_jax.Engine:
    return apb_jax.Engine(random_model(), "ring", apb_jax.make_mesh(sp=4))


def test_questions_to_one_session_do_not_see_each_other(engine: Any) -> None:
    """In any order, and as if the document had been prefilled for each."""
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    asked = {i: session.ask(QUERIES[i], 4, stop_ids=(), logits=True) for i in (2, 0, 1, 0)}
    for i, answer in asked.items():
        alone = engine.generate(DOCUMENT, QUERIES[i], 4, stop_ids=(), logits=True)
        assert answer.tokens == alone.tokens
        np.testing.assert_array_equal(answer.query_logits, alone.query_logits)
    assert session.generate(4, stop_ids=())[0].tokens == asked[0].tokens


def test_every_stop_id_of_a_list_stops(engine: Any) -> None:
    """Wherever it stands in the list, also beyond one granule of ids."""
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    free = session.ask(None, 6, stop_ids=(), sampler=Sampler(5.0), seed=3)
    assert free.finish_reason == "length"
    assert free.decode_steps == 5
    target = free.tokens[3]
    assert target not in free.tokens[:3]
    others = [i for i in range(96) if i not in free.tokens][:11]
    for place in (0, 5, 11):
        stops = [*others[:place], target, *others[place:]]
        answer = session.ask(None, 6, stop_ids=stops, sampler=Sampler(5.0), seed=3)
        assert answer.tokens == free.tokens[:3]
        assert answer.finish_reason == "stop"
        assert answer.decode_steps == 3


def test_two_new_tokens_cost_one_step(engine: Any) -> None:
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    assert session.ask(None, 1, stop_ids=()).decode_steps == 0
    answer = session.ask(None, 2, stop_ids=())
    assert (len(answer.tokens), answer.decode_steps) == (2, 1)
    assert answer.decode_ms_per_token == pytest.approx(1e3 * answer.decode_s)


def test_sampler_settings_are_not_another_program(engine: Any) -> None:
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    session.ask(None, 3, stop_ids=(), sampler=Sampler(0.7, 0.9))
    before = engine.programs.count("decode")
    drawn = {tuple(session.ask(None, 3, stop_ids=(), sampler=Sampler(t, 0.9), seed=1).tokens) for t in (0.1, 3.0)}
    assert engine.programs.count("decode") == before
    assert len(drawn) == 2


def test_a_nucleus_of_nothing_but_the_best_is_greedy(engine: Any) -> None:
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    best = session.ask(None, 5, stop_ids=())
    assert session.ask(None, 5, stop_ids=(), sampler=Sampler(2.0, 1e-6)).tokens == best.tokens


def test_what_cannot_fit_is_refused_before_the_prefill(engine: Any) -> None:
    stages: list[str] = []
    engine.listen(lambda stage, done, total: stages.append(stage))
    try:
        with pytest.raises(UserError, match=r"with 4000 new ones 4260; random has 4096 positions"):
            engine.generate(DOCUMENT, QUERIES[0], 4000)
        assert stages == []
    finally:
        engine.listen(None)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**40}, "seed is 1099511627776"),
        ({"stop_ids": (1.5,)}, "stop_ids holds 1.5"),
        ({"stop_ids": ("x",)}, "stop_ids holds 'x'"),
    ],
)
def test_wrong_options_are_refused_in_words(engine: Any, options: dict[str, Any], rule: str) -> None:
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    with pytest.raises(UserError, match=rule):
        session.ask(None, **options)


def test_ids_outside_the_vocabulary_are_refused(engine: Any) -> None:
    session = engine.prefill([engine.prompt(DOCUMENT, QUERIES[0])])
    for bad in (-5, 99999):
        with pytest.raises(UserError, match=f"has (token id )?{bad}"):
            session.logits([[bad]])
        with pytest.raises(UserError, match=f"has (token id )?{bad}"):
            session.ask([1, bad], 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "hot"])
def test_a_temperature_must_be_a_number(value: Any) -> None:
    with pytest.raises(UserError, match="temperature"):
        Sampler(value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(engine: Any, bad: float) -> None:
    """Not an answer of zeros: at the query, and at a step whose earlier tokens have been told; of one request alone."""
    prompts = [engine.prompt(DOCUMENT, QUERIES[0]), engine.prompt(DOCUMENT, QUERIES[1])]
    session = engine.prefill(prompts)
    told: list[tuple[int, list[int]]] = []
    generation = session.start(None, 6, stop_ids=(), on_tokens=lambda request, fresh: told.append((request, fresh)))
    session.cache = jax.tree.map(lambda leaf: leaf.at[:, 1].multiply(bad), session.cache)
    with pytest.raises(UserError, match="logits of request 1 after 1 tokens of the answer hold NaN or infinity"):
        generation.step()
    assert [len(fresh) for _, fresh in told] == [1, 1, 5]
    for ask in (session.ask, session.logits):
        with pytest.raises(UserError, match="logits of request 1 behind the query hold NaN or infinity"):
            ask()

"""Several methods over one set of weights: each on the shards that it can use, one after the other."""

import gc
import types
import weakref

import jax
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.measure.beside import Beside
from apb_jax.measure.compare import Asking, beside, run_one, timed


def test_one_session_is_alive_at_a_time_and_each_method_has_its_own_peak(monkeypatch):
    """128K of three methods would not fit beside each other; the largest program of one is not the peak of all."""
    first = apb_jax.Engine(random_model(), "full", apb_jax.make_mesh(sp=2))
    others = Beside(first)
    engines = [first, others.of(apb_jax.MethodSpec("ring")), others.of(apb_jax.MethodSpec("star"))]
    made, prefill = [], apb_jax.Engine.prefill

    def watched(self, *given, **named):
        gc.collect()
        assert [one for one in made if one() is not None] == []
        session = prefill(self, *given, **named)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(apb_jax.Engine, "prefill", watched)
    asking = Asking(first.prompt(ids(0, 96), ids(1, 8)), 3, stop_ids=(), alone=False)
    first.programs.largest = 1 << 60  # of something that ran before
    started = run_one(first, asking)
    result = beside(engines, asking, started)
    assert len(made) == 3 * 3  # to answer, to be timed, to be read for the receipt
    assert [other["method"] for other in result["compare"]] == ["ring", "star"]
    assert all(0 < one["peak_bytes_per_device"] < 1 << 60 for one in (result, *result["compare"]))


def test_a_prefill_is_timed_warm_and_the_median_counts():
    seconds = iter([5.0, 1.0, 2.0])
    engine = types.SimpleNamespace(
        progress=lambda *told: None, prefill=lambda prompts: types.SimpleNamespace(prefill_s=next(seconds))
    )
    result = {"prefill_s": 99.0, "document_tokens": 10}
    timed(engine, Asking(None, 1, repeat=3), result)
    assert (result["prefill_runs_s"], result["prefill_s"], result["prefill_tokens_per_s"]) == (
        [5.0, 1.0, 2.0],
        2.0,
        5.0,
    )


@pytest.mark.parametrize("virtual", [False, True])
def test_one_device_methods_run_beside_sharded_ones(virtual):
    mesh = apb_jax.make_mesh(sp=1 if virtual else 4)
    first = apb_jax.Engine(apb_jax.load("tiny"), "full", mesh, shards=4 if virtual else None)
    beside = Beside(first)
    engines = {name: beside.of(apb_jax.MethodSpec(name)) for name in ("apb", "streaming", "locret", "full")}
    assert {name: engine.shards for name, engine in engines.items()} == {
        "apb": 4, "streaming": 1, "locret": 1, "full": 1 if virtual else 4,
    }  # fmt: skip
    placed = {id(leaf) for name in ("streaming", "locret") for leaf in jax.tree.leaves(engines[name].state)}
    assert len(placed) == len(jax.tree.leaves(first.state)), "the weights of one device are placed once"
    window = apb_jax.MethodSpec("streaming", {"window_tokens": 4096})
    document, query = np.arange(10, 710, dtype=np.int32), np.arange(20, 28, dtype=np.int32)
    streamed, full = (
        engine.generate(document=document, query=query, max_new_tokens=4, stop_ids=(), logits=True)
        for engine in (beside.of(window), engines["full"])
    )
    np.testing.assert_allclose(streamed.query_logits, full.query_logits, atol=2e-3)

"""A prefill without a cache gives the hidden rows of the one with it; programs compiled ahead are the ones called."""

import numpy as np
import pytest
from helpers import ids, random_model

from apb_jax import Engine, MethodSpec, make_mesh
from apb_jax.cache import DocumentCache
from apb_jax.measure.prefill_alone import PrefillAlone, widened
from apb_jax.prefill import run


@pytest.fixture(scope="module")
def engine():
    return Engine(random_model(), MethodSpec("full"), make_mesh(1))


@pytest.mark.parametrize(("method", "shards"), [("full", 1), ("apb", 4)])
def test_rows_are_those_with_a_cache(engine, method, shards):
    engine = engine.with_method(method, shards=shards)
    prompt = engine.prompt(np.asarray(ids(0, 200)), np.asarray(ids(1, 5)))
    alone = PrefillAlone.of(engine, prompt, size=1)
    alone.compile_ahead()
    (key,) = engine.programs.begun
    steps = [(done, np.asarray(x)) for done, _, x in alone.layers()]
    assert [done for done, _ in steps] == [1, 2]
    assert key in engine.programs.compiled
    assert not engine.programs.begun
    layout = engine.choose([prompt])[0].layout([prompt], shards)
    cache = engine.programs.zeros(DocumentCache, 1, shards * layout.kept_capacity, engine.model.dtype)
    *_, (_, state) = run(engine.programs, alone.method, engine.state, alone.tokens, alone.rows, cache)
    np.testing.assert_allclose(steps[-1][1], np.asarray(state.x), rtol=1e-5, atol=1e-5)


def test_an_error_of_the_background_reaches_the_caller(engine):
    def make():
        raise ValueError("no such program")

    engine.programs.ahead("broken", None, make, ())
    with pytest.raises(ValueError, match="no such program"):
        engine.programs.call("broken", None, make, ())
    assert not engine.programs.begun


def test_a_model_gets_positions_and_never_loses_any():
    model = random_model()
    assert widened(model, 10**6).config.max_positions == 10**6
    assert widened(model, 10).config.max_positions == model.config.max_positions

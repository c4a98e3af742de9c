"""Programs compiled ahead are exactly those that the request then calls, and its answer is the same."""

import numpy as np
import pytest
from helpers import ids, random_model

from apb_jax import Engine, MethodSpec, make_mesh


@pytest.mark.parametrize(("method", "shards", "devices"), [("apb", 8, 2), ("full", 1, 1)])
def test_nothing_is_compiled_twice_and_nothing_in_vain(method, shards, devices):
    stages = []
    model = random_model()
    engine = Engine(model, MethodSpec(method), make_mesh(devices), shards=shards)
    engine.listen(lambda stage, done, total: stages.append(stage))
    document, query = ids(0, 300), ids(1, 5)
    answer = engine.generate(document, query, 4)
    for name in ("prefill", "query", "decode"):
        assert engine.programs.count(name) == 1
        assert stages.count(f"compile {name}") == 1
    assert not engine.programs.begun
    assert stages.index("compile decode") < stages.index("prefill")  # nothing runs before all are there
    session = Engine(model, MethodSpec(method), make_mesh(devices), shards=shards).prefill(
        [engine.prompt(np.asarray(document), np.asarray(query))]
    )
    assert session.generate(4)[0].tokens == answer.tokens

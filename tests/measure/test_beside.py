"""Several methods over one set of weights: each on the shards that it can use."""

import jax
import numpy as np
import pytest

import apb_jax
from apb_jax.measure.beside import Beside


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

"""Float32 products are multiplied as float32 on every device, read off the programs of every method."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.method_cases import CASES, method, model
from helpers import ids

import apb_jax
from apb_jax.errors import UserError
from apb_jax.measure.traffic import equations
from apb_jax.model.config import with_string
from apb_jax.precision import Precision
from apb_jax.programs import Programs
from apb_jax.retaining.labels import Sample, trace
from apb_jax.retaining.objective import layer_scores
from apb_jax.retaining.train import initial_heads

HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
CHOSEN: dict[str, tuple[int, Any]] = {
    **{name: (row.collectives[0][0], method(name, **row.collectives[0][1])) for name, row in CASES.items()},
    "apb, heads": (4, apb_jax.APB(16, 8)),
    "apb, heads, shared anchor": (4, apb_jax.APB(16, 8, shared_anchor=True)),
    "apb, query": (4, apb_jax.APB(16, 8, scorer="query", shared_anchor=True)),
    "streaming, own decoding": (1, method("streaming", sink_tokens=4, window_tokens=32, generation="window")),
}


def float_products(jaxpr: Any) -> list[tuple[str, Any]]:
    """(equation, precision) of every product of float32 numbers."""
    found = []
    for equation in equations(jaxpr.jaxpr):
        inputs = [v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")]
        if equation.primitive.name in PRODUCTS and jnp.float32 in inputs:
            found.append((str(equation), equation.params["precision"]))
    return found


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every program by name, traced where it would have been compiled; what it would have returned is zeros."""
    programs: dict[str, Any] = {}

    def call(self: Programs, name: str, static: Any, make: Any, args: tuple[Any, ...]) -> Any:
        program = make().trace(*args)
        programs[name] = program.jaxpr
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.out_info)

    monkeypatch.setattr(Programs, "call", call)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: tree)
    return programs


def check(engine: apb_jax.Engine, traced: dict[str, Any]) -> None:
    """Prefill, query and decoding step of the engine."""
    generation = engine.prefill([engine.prompt(ids(1, 251), ids(2, 9))]).start(max_new_tokens=4, logits=True)
    generation.step()
    for name in ("prefill", "query", "decode"):
        products = float_products(traced[name])
        assert products, name
        assert [equation for equation, precision in products if precision != HIGHEST] == [], name


@pytest.mark.parametrize("name", CHOSEN)
def test_every_product_of_a_method(name: str, traced: dict[str, Any]) -> None:
    shards, chosen = CHOSEN[name]
    check(apb_jax.Engine(model(), chosen, apb_jax.make_mesh(sp=shards)), traced)


@pytest.mark.parametrize("kind", ["folded", "tied", "string", "slices", "virtual shards"])
def test_every_product_of_a_model(kind: str, traced: dict[str, Any]) -> None:
    loaded, mesh, changes = model(), apb_jax.make_mesh(sp=4), {}
    if kind == "folded":
        loaded = dataclasses.replace(loaded, fold_heads=True)
    elif kind == "tied":
        loaded = model(tie_embeddings=True)
    elif kind == "string":
        loaded = dataclasses.replace(loaded, config=with_string(loaded.config, 60, 16))
    elif kind == "slices":
        changes = {"slice_decode": True}
    else:
        mesh, changes = apb_jax.make_mesh(sp=2), {"shards": 4}
    check(apb_jax.Engine(loaded, apb_jax.APB(16, 8), mesh, **changes), traced)


def test_every_product_of_the_training_of_heads() -> None:
    loaded = model()
    graph, weights = loaded.graph(), loaded.place(None)
    heads = initial_heads(loaded.config, 8, 0)

    def step(tokens: jax.Array) -> jax.Array:
        out = trace(graph, weights, Sample(tokens, jnp.int32(20), jnp.int32(30), 24, 16))

        def loss(heads: Any) -> jax.Array:
            return layer_scores(heads, out.q, out.k, out.v).sum() + out.labels.sum()

        return jax.grad(loss)(heads).fc2

    products = float_products(jax.make_jaxpr(step)(jnp.zeros((1, 40), jnp.int32)))
    assert len(products) > 10
    assert [equation for equation, precision in products if precision != HIGHEST] == []


def test_the_walk_sees_a_product_without_precision() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda row: jnp.dot(row, row), x)

    assert [p for _, p in float_products(jax.make_jaxpr(step)(jnp.zeros((3, 4))))] == [None]


def test_a_precision_that_does_not_exist_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="the precision of kv is 'int3'; it can be model"):
        Precision(kv="int3")

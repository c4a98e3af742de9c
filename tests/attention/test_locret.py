"""Locret's local tokens: all of a query counts as local, also where it is longer than ``local_tokens``."""

from __future__ import annotations

import numpy as np
from helpers import ids, random_model

import apb_jax
from apb_jax.attention.registry import METHODS


def test_a_query_longer_than_the_local_tokens_leaves_all_of_the_document_to_the_budget() -> None:
    """Then it does not matter by how much: the same rows are chunked, and the same ones survive."""
    document, query = ids(1, 150), ids(2, 9)
    model, mesh = random_model(), apb_jax.make_mesh(1)
    found = []
    for local in (0, 5, 9):
        method = METHODS["locret"](budget_tokens=40, local_tokens=local, chunk_tokens=32, stabilizers=8)
        engine = apb_jax.Engine(model, method, mesh)
        session = engine.prefill([engine.prompt(document, query)])
        assert session.layout.kept_tokens.tolist() == [[40]]
        found.append(session.logits([[3, 4]])[0])
    for other in found[:2]:
        np.testing.assert_allclose(other, found[2], atol=1e-5)
    beyond = METHODS["locret"](budget_tokens=40, local_tokens=20, chunk_tokens=32, stabilizers=8)
    engine = apb_jax.Engine(model, beyond, mesh)
    session = engine.prefill([engine.prompt(document, query)])
    assert session.layout.kept_tokens.tolist() == [[51]]  # the last 20 - 9 tokens beside the budget
    assert np.abs(session.logits([[3, 4]])[0] - found[2]).max() > 1e-3

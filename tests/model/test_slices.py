"""Decoding with the weights as slices over the sequence axis: the same logits, and how many collectives it takes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.errors import UserError
from apb_jax.model.slices import WeightSlices


@pytest.mark.parametrize(
    ("sp", "tp", "changes"), [(2, 1, {}), (8, 1, {"tie_embeddings": True}), (4, 2, {"qkv_bias": True})]
)
def test_sliced_weights_give_the_same_answer(sp: int, tp: int, changes: dict[str, bool]) -> None:
    """Query phase and decoding, a batch of two, APB over the mesh; with tensor parallelism beside it."""
    model = random_model(**changes)
    mesh = apb_jax.make_mesh(sp=sp, tp=tp)
    method = apb_jax.APB(24, 8, query_at=3)
    documents, queries = [ids(3, 251), ids(4, 197)], [ids(2, 9), ids(5, 4)]
    plain, sliced = (
        apb_jax.Engine(model, method, mesh, slice_decode=choice).generate(
            documents, queries, 4, stop_ids=(), logits=True
        )
        for choice in (False, True)
    )
    for a, b in zip(plain, sliced, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.query_logits, b.query_logits, atol=2e-5)
        np.testing.assert_allclose(a.step_logits, b.step_logits, atol=2e-5)


def test_one_device_has_nothing_to_slice() -> None:
    engine = apb_jax.Engine(random_model(), "full", apb_jax.make_mesh(sp=1), slice_decode=True)
    assert engine.programs.slices is None


def test_widths_that_do_not_divide_are_refused() -> None:
    model = random_model()
    with pytest.raises(UserError, match=r"3 devices do not divide the .*; nearest legal choice: --sp 2"):
        apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=3), slice_decode=True)
    from apb_jax.presets import MODELS

    for name in MODELS:
        for count in (2, 4, 8) if MODELS[name].config.num_kv_heads % 8 == 0 else ():
            assert WeightSlices.why_not(MODELS[name].config, count) is None

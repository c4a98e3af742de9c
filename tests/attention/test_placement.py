"""Shards are a number, devices are a place: the same logits wherever the shards stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention.method_cases import DOCUMENT, QUERY, model
from helpers import count_collectives

import apb_jax
from apb_jax.attention.placement import Placement
from apb_jax.errors import UserError
from apb_jax.measure.recovered import recovered_mass

METHODS = {
    "apb": apb_jax.MethodSpec("apb", {"anchor_tokens": 16, "passing_tokens": 4, "query_at": 2}),
    "plain apb": apb_jax.MethodSpec(
        "apb", {"anchor_tokens": 16, "passing_tokens": 4, "query_at": 2, "shared_anchor": False, "scorer": "query"}
    ),
    "star": apb_jax.MethodSpec("star"),
    "starx": apb_jax.MethodSpec("starx"),
    "spava": apb_jax.MethodSpec("spava", {"anchor_tokens": 16, "passing_tokens": 4}),
    "ring": apb_jax.MethodSpec("ring"),
}


def answer(spec: Any, shards: int, devices: int, order: str, bottom_right: bool = False) -> Any:
    engine = apb_jax.Engine(
        model(), spec, apb_jax.make_mesh(sp=devices), shards=shards, placement=order, bottom_right_query=bottom_right
    )
    documents = [DOCUMENT, DOCUMENT[:-30]]
    return engine.generate(documents, [QUERY, QUERY[:-2]], 2, stop_ids=(), logits=True)


@pytest.mark.parametrize("name", METHODS)
def test_equal_logits_on_any_devices(name: str) -> None:
    """As many devices as shards is the plain form; a batch of two lengths. A ring's shards are its devices."""
    want = answer(METHODS[name], 8, 8, "contiguous")
    for devices, order in ((1, "contiguous"), (2, "zigzag"), (4, "contiguous"))[: 1 if name == "ring" else 3]:
        got = answer(METHODS[name], 8, devices, order)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.query_logits, b.query_logits, atol=2e-5, err_msg=f"{devices} {order}")
            np.testing.assert_allclose(a.step_logits, b.step_logits, atol=2e-5)


def test_sixteen_shards_on_two_devices_and_one() -> None:
    """More shards than there could be devices here; the quirk of the query phase goes by shards, not by devices."""
    got = [
        answer(METHODS["apb"], 16, devices, order, bottom_right=True)
        for devices, order in ((1, "contiguous"), (2, "zigzag"), (8, "zigzag"), (8, "contiguous"))
    ]
    for other in got[1:]:
        for a, b in zip(other, got[0], strict=True):
            np.testing.assert_allclose(a.query_logits, b.query_logits, atol=2e-5)
            np.testing.assert_allclose(a.step_logits, b.step_logits, atol=2e-5)


def test_every_place_compiles_as_many_programs_and_exchanges_as_often() -> None:
    counts, collectives = set(), set()
    for devices in (1, 2, 4, 8):
        engine = apb_jax.Engine(model(), METHODS["apb"], apb_jax.make_mesh(sp=devices), shards=8)
        engine.generate(DOCUMENT, QUERY, 2, stop_ids=())
        counts.add(len(engine.programs.compiled))
        if devices > 1:
            collectives.add(tuple(sorted(prefill_collectives(engine).items())))
    assert len(counts) == 1
    assert collectives == {(("all_gather", 1), ("psum", 1))}


def prefill_collectives(engine: Any) -> dict[str, int]:
    from attention.test_apb import prefill_jaxpr

    fresh = engine.with_method(engine.method)
    fresh.programs.compiled.clear()
    return count_collectives(prefill_jaxpr(fresh, engine.method))


def test_recovered_mass_goes_by_shards() -> None:
    masses = []
    for devices, order in ((4, "contiguous"), (1, "contiguous"), (2, "zigzag")):
        engine = apb_jax.Engine(model(), METHODS["apb"], apb_jax.make_mesh(sp=devices), shards=4, placement=order)
        mass = recovered_mass(engine.prefill([engine.prompt(DOCUMENT, QUERY)]))
        assert mass is not None
        masses.append(np.sort(mass.shares, axis=2))
    np.testing.assert_allclose(masses[1], masses[0], atol=1e-5)
    np.testing.assert_allclose(masses[2], masses[0], atol=1e-5)


def test_where_shards_stand() -> None:
    assert Placement.of(8, 2).table.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    zigzag = Placement.of(8, 2, "zigzag")
    assert zigzag.table.tolist() == [[0, 7, 1, 6], [2, 5, 3, 4]]
    assert zigzag.order_of_rows[zigzag.places].tolist() == list(range(8))
    for devices in (1, 2, 4, 8):
        table = Placement.of(16, devices, "zigzag").table
        assert sorted(table.reshape(-1).tolist()) == list(range(16))
        assert len(set(table.sum(axis=1).tolist())) == 1, "every device sees as many earlier shards"


@pytest.mark.parametrize(
    ("shards", "devices", "order", "rule"),
    [
        (3, 2, "contiguous", "--shards 3 is no multiple of the 2 devices .* nearest legal choice: --shards 4"),
        (0, 1, "contiguous", "--shards 0 is no multiple"),
        (6, 2, "zigzag", "a device has 3; nearest legal choice: --shards 8"),
        (4, 2, "spiral", "placement 'spiral' is unknown"),
    ],
)
def test_what_cannot_be_placed_is_refused(shards: int, devices: int, order: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Placement.of(shards, devices, order)

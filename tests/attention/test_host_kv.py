"""Document KV in host memory: the answers of a cache on the devices, which hold few layers of it at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax import host_kv
from apb_jax.attention.registry import MethodSpec
from apb_jax.errors import UserError
from apb_jax.host_kv import ON_DEVICE, PINNED, HostCache
from apb_jax.model.config import with_string
from apb_jax.precision import Precision
from apb_jax.sampling import Sampler

LAYERS = 5
"""More than a device holds at a time."""
MODEL = random_model(num_layers=LAYERS)
DOCUMENT, QUERY, OTHER = ids(1, 251), ids(2, 9), ids(3, 5)
ANSWER = 19
"""Tokens: more than one chunk of decoding."""
APB = {"anchor_tokens": 16, "passing_tokens": 8}
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "full": ("full", {}, 1, {}),
    "apb": ("apb", APB, 2, {"slice_decode": True, "bottom_right_query": True}),
    "apb, 4 shards on 2 devices, 8-bit KV": (
        "apb", APB, 2, {"shards": 4, "placement": "zigzag", "precision": Precision(kv="int8")},
    ),
    "infllm, which decodes by its own rule": ("infllm", {}, 1, {}),
}  # fmt: skip
MADE: dict[str, tuple[apb_jax.Engine, apb_jax.Engine]] = {}


def engines(case: str) -> tuple[apb_jax.Engine, apb_jax.Engine]:
    """(with the cache on the devices, with the cache in host memory); one pair a case, for compiling takes the time."""
    if case not in MADE:
        method, options, sp, settings = CASES[case]
        device = apb_jax.Engine(MODEL, MethodSpec(method, options), apb_jax.make_mesh(sp=sp), **settings)
        MADE[case] = device, device.with_method(device.method, kv_memory="host")
    return MADE[case]


def session(engine: apb_jax.Engine, documents: list[list[int]] | None = None) -> Any:
    return engine.prefill([engine.prompt(document, QUERY) for document in documents or [DOCUMENT]])


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_a_cache_on_the_devices(case: str) -> None:
    device, host = map(session, engines(case))
    assert isinstance(host.cache, HostCache)
    assert host.cache.layers == device.cache.layers == LAYERS
    for array in jax.tree.leaves(host.cache):
        assert array.sharding.memory_kind == PINNED
    for layer in range(LAYERS):
        ours, theirs = host.cache.on_host(layer), device.cache.on_host(layer)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(np.float32(array), np.float32(theirs[name]), atol=1e-5, rtol=1e-5)
    for query in (QUERY, OTHER):
        expected = device.ask(query, ANSWER, stop_ids=(), logits=True)
        found = host.ask(query, ANSWER, stop_ids=(), logits=True)
        assert found.tokens == expected.tokens
        assert found.decode_steps == ANSWER - 1
        np.testing.assert_allclose(found.query_logits, expected.query_logits, atol=2e-5)
        np.testing.assert_allclose(found.step_logits, expected.step_logits, atol=2e-5)
    np.testing.assert_allclose(host.logits([OTHER])[0], device.logits([OTHER])[0], atol=2e-5)


@pytest.mark.parametrize(("case", "stay"), [("full", 2), ("apb, 4 shards on 2 devices, 8-bit KV", 4), ("apb", LAYERS)])
def test_layers_that_stay_on_the_devices(case: str, stay: int, tmp_path: Path) -> None:
    """Some of them, all but one, all: the same answers, also from a session that was saved."""
    device, host = engines(case)
    host = host.with_method(host.method, kv_layers=stay)
    whole, found = session(device), session(host)
    kinds = [jax.tree.leaves(part)[0].sharding.memory_kind for part in found.cache.parts]
    assert [kind == PINNED for kind in kinds] == [False] * stay + [True] * (LAYERS - stay)
    expected = whole.ask(QUERY, ANSWER, stop_ids=(), logits=True)
    found.save(tmp_path / "session")
    for one in (found, host.load_session(tmp_path / "session")):
        assert one.cache.stay == stay
        answer = one.ask(QUERY, ANSWER, stop_ids=(), logits=True)
        assert answer.tokens == expected.tokens
        np.testing.assert_allclose(answer.step_logits, expected.step_logits, atol=2e-5)


def test_a_batch_with_sampling_and_stops() -> None:
    device, host = (session(one, [DOCUMENT, DOCUMENT[::-1]]) for one in engines("apb"))
    drawn = {"sampler": Sampler(0.9, 0.8), "seed": 3}
    expected = device.ask(QUERY, ANSWER, stop_ids=(), **drawn)
    stop = expected[0].tokens[5]
    for options in ({"stop_ids": ()}, {"stop_ids": (stop,)}):
        expected, found = (one.ask(QUERY, ANSWER, **options, **drawn) for one in (device, host))
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    assert found[0].finish_reason == "stop"


def test_string_positions() -> None:
    model = random_model(num_layers=LAYERS)
    model = apb_jax.LoadedModel(**(vars(model) | {"config": with_string(model.config, 0.33, 16, 300)}))
    device = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1))
    device, host = (session(one) for one in (device, device.with_method("full", kv_memory="host")))
    assert host.ask(QUERY, 4, stop_ids=()).tokens == device.ask(QUERY, 4, stop_ids=()).tokens


def test_the_devices_hold_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of a layer's shape that live on the devices, at every layer of prefill, query and decoding."""
    _, engine = engines("full")
    session(engine).ask(QUERY, 2)  # compiles
    most = 0
    shape = jax.tree.leaves(session(engine).cache)[0].shape
    moved = host_kv.moved

    def counted(*args: Any) -> Any:
        nonlocal most
        out = moved(*args)
        alive = [x for x in jax.live_arrays() if x.shape == shape and x.sharding.memory_kind != PINNED]
        most = max(most, len([x for x in alive if not x.is_deleted()]))
        return out

    monkeypatch.setattr(host_kv, "moved", counted)
    session(engine).ask(QUERY, 4, stop_ids=())
    assert 2 <= most <= 2 * ON_DEVICE  # K and V


def test_programs_do_not_grow_with_layers_or_tokens() -> None:
    _, engine = engines("full")
    first = session(engine)
    first.ask(QUERY, 3, stop_ids=())
    before = len(engine.programs.compiled)
    first.ask(QUERY, 9, stop_ids=())
    session(engine)
    assert len(engine.programs.compiled) == before
    assert engine.programs.count("prefill") == 2  # all layers on the devices, one layer in front of the host


def test_sessions_go_from_one_memory_to_the_other(tmp_path: Path) -> None:
    device, host = engines("full")
    expected = session(device).ask(QUERY, 4, stop_ids=()).tokens
    session(host).save(tmp_path / "host")
    session(device).save(tmp_path / "device")
    for engine in (device, host):
        for name in ("host", "device"):
            loaded = engine.load_session(tmp_path / name)
            assert isinstance(loaded.cache, HostCache) == (engine is host)
            assert loaded.ask(QUERY, 4, stop_ids=()).tokens == expected


def test_an_unknown_memory_is_refused() -> None:
    with pytest.raises(UserError, match="kv_memory 'disk' is unknown; choose one of device, host"):
        apb_jax.Engine(MODEL, "full", apb_jax.make_mesh(sp=1), kv_memory="disk")

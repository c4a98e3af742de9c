"""One row per method: its exact limits, settings that are not exact, and what a layer of it exchanges."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from helpers import ids, random_model

import apb_jax
from apb_jax.attention import Prompt
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.registry import METHODS
from apb_jax.decode import DecodePlan
from apb_jax.measure.traffic import Traffic, layer_traffic
from apb_jax.model.config import with_string

DOCUMENT, QUERY = ids(1, 251), ids(2, 9)  # a prime length: no shard count divides it


def method(name: str, **options: Any) -> AttentionMethod:
    """A registered method with these fields."""
    return METHODS[name](**options)


@dataclass(frozen=True)
class MethodCase:
    """``exact``: (shards, fields) where it equals full attention. ``inexact``: one where it must not.

    ``collectives``: (shards, fields, {collective: per layer}) of a prefill layer.
    """

    exact: tuple[tuple[int, dict[str, Any]], ...]
    inexact: tuple[int, dict[str, Any]] | None
    collectives: tuple[tuple[int, dict[str, Any], dict[str, int]], ...]


BLOCK = 32  # of 8 shards
CASES: dict[str, MethodCase] = {
    "full": MethodCase(((2, {}), (4, {}), (8, {})), None, ((4, {}, {"all_gather": 1}), (1, {}, {}))),
    "ring": MethodCase(
        ((1, {}), (2, {}), (4, {}), (8, {}), (4, {"order": "plain"})),
        None,
        # N - 1: after the last step nobody needs the keys any more.
        ((8, {}, {"ppermute": 7}), (4, {"order": "plain"}, {"ppermute": 3}), (1, {}, {})),
    ),
    "ulysses": MethodCase(
        # 2 KV heads: 4 shards share each of them between two; 4 query heads on 8 shards need a ring.
        ((1, {}), (2, {}), (4, {}), (8, {"ring_shards": 2}), (4, {"ring_shards": 2}), (2, {"ring_shards": 2})),
        None,
        ((4, {}, {"all_to_all": 2}), (8, {"ring_shards": 2}, {"all_to_all": 2, "ppermute": 1})),
    ),
    "star": MethodCase(
        ((1, {}), (2, {}), (1, {"block_tokens": 126}), (2, {"block_tokens": 251, "anchor_tokens": 5})),
        (4, {}),
        ((4, {}, {}), (4, {"block_tokens": 16}, {})),
    ),
    "streaming": MethodCase(
        (
            (1, {"sink_tokens": 0, "window_tokens": 256}),
            (1, {"sink_tokens": 256, "window_tokens": 32}),
            (1, {"sink_tokens": 4, "window_tokens": 270, "generation": "window"}),
        ),
        (1, {"sink_tokens": 4, "window_tokens": 32}),
        ((1, {"sink_tokens": 4, "window_tokens": 32}, {}),),
    ),
    "starx": MethodCase(
        ((1, {}),),
        (4, {}),
        ((4, {}, {}),),
    ),
    "starx_sparse": MethodCase(
        ((1, {"block_tokens": 256, "threshold": 1.0, "stride": 4, "sparse_block": 16}),
         (2, {"block_tokens": 128, "threshold": 1.0, "stride": 4, "sparse_block": 16})),
        (2, {"block_tokens": 128, "threshold": 0.3, "stride": 4, "sparse_block": 16}),
        ((2, {"block_tokens": 128, "stride": 4, "sparse_block": 16}, {}),),
    ),
    "minference": MethodCase(
        ((1, {"vertical": 300, "slash": 50}), (1, {"vertical": 30, "slash": 300}), (1, {"dense_layers": 2})),
        (1, {"vertical": 1, "slash": 1}),
        ((1, {}, {}),),
    ),
    "xattention": MethodCase(
        ((1, {"threshold": 1.0, "block_tokens": 16}), (4, {"threshold": 1.0, "block_tokens": 16})),
        (1, {"threshold": 0.3, "block_tokens": 16}),
        ((4, {"block_tokens": 16}, {"all_gather": 1}),),
    ),
    "infllm": MethodCase(
        ((1, {"local_tokens": 256, "step_tokens": 32}),),
        (1, {"init_tokens": 4, "local_tokens": 48, "step_tokens": 16, "block_tokens": 8, "retrieved_blocks": 2}),
        ((1, {"local_tokens": 48, "step_tokens": 16, "block_tokens": 8}, {}),),
    ),
    "locret": MethodCase(
        ((1, {"budget_tokens": 300, "stabilizers": 10, "chunk_tokens": 64}),
         (1, {"budget_tokens": 251, "stabilizers": 0, "chunk_tokens": 100, "local_tokens": 20})),
        (1, {"budget_tokens": 64, "stabilizers": 8, "chunk_tokens": 32, "local_tokens": 20}),
        ((1, {"budget_tokens": 64, "stabilizers": 8, "chunk_tokens": 32}, {}),),
    ),
    "spava": MethodCase(
        ((1, {"anchor_tokens": 60, "passing_tokens": 96}), (2, {"anchor_tokens": 13, "passing_tokens": 64}),
         (4, {"anchor_tokens": 19, "passing_tokens": 32})),
        (4, {"anchor_tokens": 19, "passing_tokens": 8}),
        # Two exchanges of selections; the query's rows are merged over the shards as in decoding.
        ((4, {"anchor_tokens": 19, "passing_tokens": 8}, {"all_gather": 2, "pmax": 1, "psum": 1}),),
    ),
}  # fmt: skip


@functools.cache
def model(**changes: Any) -> apb_jax.LoadedModel:
    """Random float32 weights; the same for the same changes."""
    return random_model(**changes)


@functools.cache
def string_model(offset: int, local: int, factor: float) -> apb_jax.LoadedModel:
    """The same weights under STRING."""
    config = with_string(model().config, offset, local)
    rope = dataclasses.replace(config.rope, factor=factor)
    return dataclasses.replace(model(), config=dataclasses.replace(config, rope=rope))


@functools.cache
def engine_on(loaded: Any, sp: int) -> apb_jax.Engine:
    """One engine a mesh: methods share its weights and the programs that do not depend on them."""
    return apb_jax.Engine(loaded, "full", apb_jax.make_mesh(sp=sp))


def answer(
    chosen: Any,
    sp: int,
    loaded: Any = None,
    document: Any = DOCUMENT,
    query: Any = QUERY,
    new_tokens: int | None = None,
) -> apb_jax.Answer:
    """What ``chosen`` answers on ``sp`` shards, with all logits; refuses a fallback to another method."""
    loaded = loaded or model()
    engine = engine_on(loaded, sp).with_method(chosen)
    if new_tokens is None:  # a decoding step costs a program; most methods share one that other tests exercise
        own = not isinstance(chosen, str) and DecodePlan.of(chosen).method is not None
        new_tokens = 2 if own else 1
    out = engine.generate(document, query, new_tokens, stop_ids=(), logits=True)
    for one in out if isinstance(out, list) else [out]:
        assert one.method.name == (chosen if isinstance(chosen, str) else chosen.name), one.notes
    return out


def difference(a: apb_jax.Answer, b: apb_jax.Answer) -> float:
    """Largest difference of any logit of the query rows and of the generated steps that both have."""
    steps = min(len(a.tokens), len(b.tokens))
    steps = steps if a.tokens[: steps - 1] == b.tokens[: steps - 1] else 1  # later steps follow different tokens
    rows = [(a.query_logits, b.query_logits), (a.step_logits[:steps], b.step_logits[:steps])]
    return max(float(np.abs(x - y).max()) for x, y in rows)


def traffic(chosen: AttentionMethod, sp: int) -> Traffic:
    """Of a prefill layer for the test's prompt."""
    prompt = Prompt(*(np.asarray(a, np.int32) for a in (DOCUMENT, QUERY, QUERY)))
    return layer_traffic(engine_on(model(), sp), chosen, [prompt])

"""Replays recordings of APB and of full attention: every array that a case holds (see ``recordings``)."""

from __future__ import annotations

import collections
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.recordings import Recorded, cases, count
from jax.sharding import PartitionSpec as P

import apb_jax
from apb_jax.attention.decode import attend_shard, decode_sharded
from apb_jax.attention.inputs import Kernels
from apb_jax.attention.layout import Layout
from apb_jax.attention.placement import Placement
from apb_jax.cache import DocumentCache, TailCache
from apb_jax.mesh import SP
from apb_jax.model.layers import rms_norm
from apb_jax.programs import Lengths
from pallas_kernels.retaining_score import pool_and_mask

APB_CASES, FULL_CASES = cases("apb"), cases("full")
PARTIALS = (
    "position_ids", "hidden_in", "local_out", "local_lse", "merged_out", "final_cache_k", "final_cache_v"
)  # fmt: skip
"""Of a query file: what a test of its own compares."""


class Case:
    """One recorded case and an engine that replays it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((self.folder / "case.json").read_text())
        inputs = np.load(self.folder / "inputs.npz")
        self.document, self.query = inputs["doc_ids"].tolist(), inputs["query_ids"].tolist()
        self.hosts = self.settings.get("hosts", 1)
        self.model = apb_jax.load(folder.parent / self.settings["model"], dtype="float32")
        self.method: apb_jax.APB | apb_jax.Full = apb_jax.Full()
        if self.settings["method"] == "apb":
            self.method = apb_jax.APB(
                self.settings["anchor_len"], self.settings["topk"], query_at=self.settings["query_insert_pos"]
            )
        self.engine = apb_jax.Engine(self.model, self.method, apb_jax.make_mesh(sp=self.hosts))

    def recorded(self, name: Path) -> Recorded:
        return Recorded(self.folder / f"{name}.npz")


@pytest.fixture(scope="module")
def replay() -> Any:
    """Cases by folder, each loaded once."""
    found: dict[Path, Case] = {}

    def get(folder: Path) -> Case:
        if folder not in found:
            found[folder] = Case(folder)
        return found[folder]

    return get


def record_prefill(case: Case) -> tuple[list[dict[str, np.ndarray]], np.ndarray, Layout]:
    """APB's prefill with everything it computes on the way: per layer, arrays with a leading host axis."""
    engine, method, config = case.engine, case.method, case.model.config
    assert isinstance(method, apb_jax.APB)
    prompt = engine.prompt(case.document, case.query)
    layout = method.layout([prompt], case.hosts)
    lengths = Lengths(
        layout.block_rows,
        layout.document_tokens,
        layout.embedded_query_tokens,
        np.asarray([len(case.query)], np.int32),
        placement=Placement(case.hosts),
    )
    slots = (case.hosts - 1) * method.passing_tokens

    def body(state: Any, tokens: Any, positions: Any, lengths: Lengths) -> Any:
        shard, model = lengths.shard(), engine.programs.model(state)
        limits = method.score_limits(shard, method.anchor_rows(shard))

        def attend(x: Any, _: Any) -> Any:
            q, k = x.rotated()
            raw = x.retaining.scores(x.q, x.k, x.v)
            found = {"q": q, "k": k, "v": x.v, "scores_raw": raw}
            found["scores_pooled"] = pool_and_mask(raw, replace(limits, masked=0), method.pool)
            passing = None
            if method.passing_tokens and case.hosts > 1:
                found["scores_masked"] = method.scores(x, k, shard)
                index, *pair = method.exchange(found["scores_masked"], k, x.v, shard)
                passing = (pair[0], pair[1])
                found |= {"topk_idx": index, "passing_k": pair[0], "passing_v": pair[1]}
            found["attn_out"], found["attn_lse"] = method.attend(q, k, x.v, passing, shard, Kernels())
            return found["attn_out"], found

        x, layers = model.embed(tokens), []
        for layer in range(config.num_layers):
            entering = x
            empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec_of_found(x.shape[1], slots))
            x, found = model.run_layers(x, positions, attend, empty, start=jnp.int32(layer), count=1)
            layers.append(found | {"hidden_in": entering})
        final = rms_norm(x, model.norm[...], config.rms_norm_eps)
        return jax.tree.map(lambda a: a[None], (layers, final))

    def spec_of_found(rows: int, slots: int) -> dict[str, jax.ShapeDtypeStruct]:
        heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
        f32 = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)  # noqa: E731
        out = {
            "q": f32(rows, heads, dim), "k": f32(rows, kv, dim), "v": f32(rows, kv, dim),
            "scores_raw": f32(rows, kv), "scores_pooled": f32(rows, kv),
            "attn_out": f32(rows, heads, dim), "attn_lse": f32(heads, rows),
        }  # fmt: skip
        if slots:
            out |= {
                "scores_masked": f32(rows, kv), "passing_k": f32(slots, kv, dim), "passing_v": f32(slots, kv, dim),
                "topk_idx": jax.ShapeDtypeStruct((1, method.passing_tokens, kv), jnp.int32),
            }  # fmt: skip
        return out

    flat = lambda rows: rows.reshape(1, -1)  # noqa: E731
    program = engine.programs.traced(body, (engine.programs.specs, P(None, SP), P(None, SP), P()), P(SP))
    layers, final = program(engine.state, flat(layout.tokens), flat(layout.positions), lengths)
    return [{k: np.asarray(v) for k, v in layer.items()} for layer in layers], np.asarray(final), layout


@pytest.mark.parametrize("name", APB_CASES)
def test_apb_prefill(replay: Any, name: Path) -> None:
    """Layout, scores, selection, exchange, attention and cache of every host and layer."""
    case = replay(name)
    layers, final, layout = record_prefill(case)
    anchor, block = case.settings["anchor_len"] if case.hosts > 1 else 0, int(layout.block_rows[0])
    k = case.settings["topk"]
    files = [case.recorded(f"rank{host}") for host in range(case.hosts)]
    for host in range(case.hosts):
        want = files[host]
        rows = slice(anchor if host == 0 else 0, anchor + block)
        want.equal("input_ids", layout.tokens[0, host, rows])
        want.equal("position_ids", layout.positions[0, host, rows])
        want.close("final_hidden", final[host, 0, rows])
        for index, layer in enumerate(layers):
            got = {key: value[host, 0] for key, value in layer.items()}
            where = f"in layer {index}"
            for key in ("hidden_in", "q", "k", "v", "scores_raw", "scores_pooled", "scores_masked", "attn_out"):
                if key in got:
                    want.close(key, got[key][rows], where, index)
            want.close("attn_lse", got["attn_lse"][:, rows], where, index)
            if "topk_idx" in got:
                if "topk_idx" in want:
                    want.arrays["topk_idx"][index].sort(axis=0)  # the order of a selection has no meaning
                want.equal("topk_idx", np.sort(got["topk_idx"] - rows.start, axis=0), where, index)
                used = slice((case.hosts - 1 - host) * k, None)
                for key in ("passing_k", "passing_v"):
                    # Order inside one source's selection has no meaning; sources stand in shard order.
                    for source in range(host if key in want else 0):
                        part = slice(source * k, (source + 1) * k)
                        want.arrays[key][index, part] = by_norm(want[key][index, part])
                        want.close(key, by_norm(got[key][used][part]), where, (index, part))
    # What no host receives, or has no rank for, is recorded as an empty array; the cache is the next test's.
    empty = {name for file in files for name, array in file.arrays.items() if not array.size}
    assert count(*files, unread=("cache_k", "cache_v", "topk_tie", *empty)) > 0


def by_norm(rows: np.ndarray) -> np.ndarray:
    """Rows [k, KV, D] of each head in an order of their own, so that sets can be compared."""
    order = np.argsort((rows * np.arange(1, rows.shape[-1] + 1)).sum(-1), axis=0)
    return np.take_along_axis(rows, order[..., None], axis=0)


@pytest.mark.parametrize("name", APB_CASES)
def test_apb_cache(replay: Any, name: Path) -> None:
    """The engine's cache: own block only, no anchor, no passing block, no padding."""
    case = replay(name)
    session = case.engine.prefill([case.engine.prompt(case.document, case.query)])
    kept = session.layout.kept_tokens[0]
    capacity = session.layout.block_capacity
    compared: collections.Counter[str] = collections.Counter()
    for host in range(case.hosts):
        want = case.recorded(f"rank{host}")
        rows = slice(host * capacity, host * capacity + kept[host])
        want.close("cache_k", session.cache.k[:, 0, rows])
        want.close("cache_v", session.cache.v[:, 0, rows])
        compared += want.compared
    if not compared:
        pytest.skip(f"{name.name} holds no caches")


@pytest.mark.parametrize("reading", ["query_allkeys", "query_code"])
@pytest.mark.parametrize("name", APB_CASES)
def test_apb_query_and_decode(replay: Any, name: Path, reading: str) -> None:
    """Both readings of the query phase: logits, greedy tokens, their logits, the last host's final cache."""
    case, want = replay(name), replay(name).recorded(reading)
    engine = case.engine.with_method(case.method, bottom_right_query=reading == "query_code")
    answer = engine.generate(case.document, case.query, case.settings["steps"], stop_ids=(), logits=True)
    want.equal("tokens", answer.tokens)
    want.close("query_logits", answer.query_logits)
    want.close("step_logits", answer.step_logits)
    assert count(want, unread=PARTIALS) > 0


@pytest.mark.parametrize("reading", ["query_allkeys", "query_code"])
@pytest.mark.parametrize("name", APB_CASES)
def test_apb_partials(replay: Any, name: Path, reading: str) -> None:
    """Per host and layer: attention of the query rows before the merge, after it, and the owner's tail."""
    case, want = replay(name), replay(name).recorded(reading)
    if not set(PARTIALS) & set(want.arrays):
        pytest.skip(f"{name.name} has no partial attentions in {reading}.npz")
    engine, config, rows = case.engine, case.model.config, len(case.query)
    session = engine.prefill([engine.prompt(case.document, case.query)])
    counts = np.asarray([rows], np.int32)
    old = session.lengths
    lengths = Lengths(
        *(np.asarray(x) for x in (old.block_rows, old.document_tokens, old.embedded_query_tokens)),
        counts,
        placement=Placement(case.hosts),
    )
    tail = TailCache.zeros(config, 1, rows, jnp.float32)

    def body(state: Any, tokens: Any, lengths: Lengths, cache: DocumentCache, tail: TailCache) -> Any:
        shard, model = lengths.shard(), engine.programs.model(state)
        positions = lengths.document_tokens[:, None] + jnp.arange(rows, dtype=jnp.int32)[None]
        zero = jnp.zeros((1,), jnp.int32)
        found = []
        x = model.embed(tokens)
        for layer in range(config.num_layers):

            def attend(inputs: Any, carry: Any) -> Any:
                q, k = inputs.rotated()
                tail = carry[0].write(inputs.layer, zero, k, inputs.v)
                args = (
                    q,
                    cache.at(inputs.layer),
                    lengths.kept(shard),
                    tail.at(inputs.layer),
                    zero,
                    shard,
                )
                quirk = lengths.query_tokens if reading == "query_code" else None
                out, lse = attend_shard(*args, query_tokens=quirk)
                merged = decode_sharded(*args, query_tokens=quirk)
                return merged, (tail, out, lse, merged)

            shape = (1, rows, config.num_heads, config.head_dim)
            empty = (tail, jnp.zeros(shape), jnp.zeros((1, config.num_heads, rows)), jnp.zeros(shape))
            entering = x
            x, (tail, *rest) = model.run_layers(x, positions, attend, empty, start=jnp.int32(layer), count=1)
            found.append((entering, *rest))
        return jax.tree.map(lambda a: a[None], (found, tail))

    caches = DocumentCache.specs()
    program = engine.programs.traced(body, (engine.programs.specs, P(), P(), caches, P()), P(SP))
    found, tail = program(engine.state, np.asarray([case.query], np.int32), lengths, session.cache, tail)
    for layer, (entering, out, lse, merged) in enumerate(found):
        want.close("hidden_in", entering[0, 0], pick=layer)
        want.close("merged_out", merged[0, 0], pick=layer)
        for host in range(case.hosts):
            want.close("local_out", out[host, 0], pick=(host, layer))
            want.close("local_lse", lse[host, 0], pick=(host, layer))
    kept, capacity = session.layout.kept_tokens[0], session.layout.block_capacity
    start = (case.hosts - 1) * capacity
    for key, ours, ours_tail in (("k", session.cache.k, tail.k), ("v", session.cache.v, tail.v)):
        mine = np.concatenate([ours[:, 0, start : start + kept[-1]], ours_tail[0, :, 0]], axis=1)
        want.close(f"final_cache_{key}", mine, pick=(slice(None), slice(mine.shape[1])))
    assert count(want, unread=("tokens", "query_logits", "step_logits", "position_ids")) > 0


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", FULL_CASES)
def test_full(replay: Any, name: Path, shards: int) -> None:
    """Plain causal Llama of transformers, on one shard and on four: logits of every row, tokens, cache."""
    case, want = replay(name), replay(name).recorded("full")
    engine = apb_jax.Engine(case.model, apb_jax.Full(), apb_jax.make_mesh(sp=shards))
    session = engine.prefill([engine.prompt(case.document, case.query)])
    (answer,) = session.generate(case.settings["steps"], stop_ids=(), logits=True)
    want.equal("tokens", answer.tokens)
    want.close("step_logits", answer.step_logits)
    want.close("logits", answer.query_logits, pick=slice(len(case.document), None))
    kept, capacity = session.layout.kept_tokens[0], session.layout.block_capacity
    for key, cache in (("cache_k", session.cache.k), ("cache_v", session.cache.v)):
        mine = np.concatenate([cache[:, 0, r * capacity : r * capacity + kept[r]] for r in range(shards)], axis=1)
        want.close(key, mine, pick=(slice(None), slice(len(case.document))))
    assert count(want, unread=("hidden_in", "final_hidden", "attn_out")) > 0

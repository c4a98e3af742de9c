"""Replays recordings of the reference implementations: every array of every ``apb_*`` and ``full_*`` case.

The folder is ``APB_GOLDEN`` (default ../shared/golden); its README defines the arrays.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, golden_cases
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

TOLERANCE = 1e-3  # absolute, float32; the recordings' README
APB_CASES, FULL_CASES = golden_cases("apb"), golden_cases("full")
pytestmark = pytest.mark.skipif(
    not (APB_CASES or FULL_CASES), reason=f"no recordings in {GOLDEN}; set APB_GOLDEN to a folder that has some"
)
LOWEST = np.finfo(np.float32).min


class Case:
    """One recorded case and an engine that replays it."""

    def __init__(self, name: str) -> None:
        self.folder = GOLDEN / name
        self.settings = json.loads((self.folder / "case.json").read_text())
        inputs = np.load(self.folder / "inputs.npz")
        self.document, self.query = inputs["doc_ids"].tolist(), inputs["query_ids"].tolist()
        self.hosts = self.settings.get("hosts", 1)
        self.model = apb_jax.load(GOLDEN / self.settings["model"], dtype="float32")
        self.method: apb_jax.APB | apb_jax.Full = apb_jax.Full()
        if self.settings["method"] == "apb":
            self.method = apb_jax.APB(
                self.settings["anchor_len"], self.settings["topk"], query_at=self.settings["query_insert_pos"]
            )
        self.engine = apb_jax.Engine(self.model, self.method, apb_jax.make_mesh(sp=self.hosts))

    def recorded(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / f"{name}.npz"
        return dict(np.load(path)) if path.exists() else {}


@pytest.fixture(scope="module")
def replay() -> Any:
    """Cases by name, each loaded and prefilled once."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        return cases.setdefault(name, Case(name))

    return get


def close(actual: Any, expected: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=TOLERANCE, err_msg=what)


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
def test_apb_prefill(replay: Any, name: str) -> None:
    """Layout, scores, selection, exchange, attention and cache of every host and layer."""
    case = replay(name)
    layers, final, layout = record_prefill(case)
    anchor, block = case.settings["anchor_len"] if case.hosts > 1 else 0, int(layout.block_rows[0])
    k = case.settings["topk"]
    compared = 0
    for host in range(case.hosts):
        want = case.recorded(f"rank{host}")
        rows = slice(anchor if host == 0 else 0, anchor + block)
        np.testing.assert_array_equal(layout.tokens[0, host, rows], want["input_ids"])
        np.testing.assert_array_equal(layout.positions[0, host, rows], want["position_ids"])
        close(final[host, 0, rows], want["final_hidden"], f"final hidden of host {host}")
        for index, layer in enumerate(layers):
            got = {key: value[host, 0] for key, value in layer.items()}
            where = f"host {host} layer {index}"
            for key in ("hidden_in", "q", "k", "v", "scores_raw", "scores_pooled", "scores_masked", "attn_out"):
                if key in want and key in got:
                    close(got[key][rows], want[key][index], f"{key} of {where}")
                    compared += 1
            close(got["attn_lse"][:, rows], want["attn_lse"][index], f"attn_lse of {where}")
            if "topk_idx" in got:
                chosen = got["topk_idx"] - rows.start
                np.testing.assert_array_equal(
                    np.sort(chosen, axis=0), np.sort(want["topk_idx"][index], axis=0), err_msg=f"top-k of {where}"
                )
                used = slice((case.hosts - 1 - host) * k, None)
                for key in ("passing_k", "passing_v"):
                    # Order inside one source's selection has no meaning; sources stand in shard order.
                    for source in range(host):
                        part = slice(source * k, (source + 1) * k)
                        close(by_norm(got[key][used][part]), by_norm(want[key][index][part]), f"{key} of {where}")
    assert compared >= 6 * case.hosts * len(layers)


def by_norm(rows: np.ndarray) -> np.ndarray:
    """Rows [k, KV, D] of each head in an order of their own, so that sets can be compared."""
    order = np.argsort((rows * np.arange(1, rows.shape[-1] + 1)).sum(-1), axis=0)
    return np.take_along_axis(rows, order[..., None], axis=0)


@pytest.mark.parametrize("name", APB_CASES)
def test_apb_cache(replay: Any, name: str) -> None:
    """The engine's cache: own block only, no anchor, no passing block, no padding."""
    case = replay(name)
    session = case.engine.prefill([case.engine.prompt(case.document, case.query)])
    kept = session.layout.kept_tokens[0]
    capacity = session.layout.block_capacity
    for host in range(case.hosts):
        want = case.recorded(f"rank{host}")
        rows = slice(host * capacity, host * capacity + kept[host])
        close(session.cache.k[:, 0, rows], want["cache_k"], f"cache_k of host {host}")
        close(session.cache.v[:, 0, rows], want["cache_v"], f"cache_v of host {host}")


@pytest.mark.parametrize("reading", ["query_allkeys", "query_code"])
@pytest.mark.parametrize("name", APB_CASES)
def test_apb_query_and_decode(replay: Any, name: str, reading: str) -> None:
    """Both readings of the query phase: logits, greedy tokens, their logits, the last host's final cache."""
    case, want = replay(name), replay(name).recorded(reading)
    if not want:
        pytest.skip(f"{name} has no recording {reading}.npz")
    engine = case.engine.with_method(case.method, bottom_right_query=reading == "query_code")
    answer = engine.generate(case.document, case.query, case.settings["steps"], stop_ids=(), logits=True)
    assert answer.tokens == want["tokens"].tolist()
    close(answer.query_logits, want["query_logits"], "query logits")
    close(answer.step_logits, want["step_logits"], "step logits")


@pytest.mark.parametrize("reading", ["query_allkeys", "query_code"])
@pytest.mark.parametrize("name", APB_CASES)
def test_apb_partials(replay: Any, name: str, reading: str) -> None:
    """Per host and layer: attention of the query rows before the merge, after it, and the owner's tail."""
    case, want = replay(name), replay(name).recorded(reading)
    if "local_out" not in want:
        pytest.skip(f"{name} has no partial attentions in {reading}.npz")
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
                args = (q, cache.at(inputs.layer), lengths.kept(shard), tail.at(inputs.layer).alone(), zero, shard)
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
        close(entering[0, 0], want["hidden_in"][layer], f"hidden_in of layer {layer}")
        close(merged[0, 0], want["merged_out"][layer], f"merged_out of layer {layer}")
        for host in range(case.hosts):
            close(out[host, 0], want["local_out"][host, layer], f"local_out of host {host} layer {layer}")
            close(lse[host, 0], want["local_lse"][host, layer], f"local_lse of host {host} layer {layer}")
    kept, capacity = session.layout.kept_tokens[0], session.layout.block_capacity
    start = (case.hosts - 1) * capacity
    for key, ours, ours_tail in (("k", session.cache.k, tail.k), ("v", session.cache.v, tail.v)):
        mine = np.concatenate([ours[:, 0, start : start + kept[-1]], ours_tail[0, :, 0]], axis=1)
        close(mine, want[f"final_cache_{key}"][:, : mine.shape[1]], f"final_cache_{key}")


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", FULL_CASES)
def test_full(replay: Any, name: str, shards: int) -> None:
    """Plain causal Llama of transformers, on one shard and on four: logits of every row, tokens, cache."""
    case, want = replay(name), replay(name).recorded("full")
    engine = apb_jax.Engine(case.model, apb_jax.Full(), apb_jax.make_mesh(sp=shards))
    session = engine.prefill([engine.prompt(case.document, case.query)])
    (answer,) = session.generate(case.settings["steps"], stop_ids=(), logits=True)
    assert answer.tokens == want["tokens"].tolist()
    close(answer.step_logits, want["step_logits"], "step logits")
    close(answer.query_logits, want["logits"][len(case.document) :], "query logits")
    kept, capacity = session.layout.kept_tokens[0], session.layout.block_capacity
    for key, cache in (("cache_k", session.cache.k), ("cache_v", session.cache.v)):
        mine = np.concatenate([cache[:, 0, r * capacity : r * capacity + kept[r]] for r in range(shards)], axis=1)
        close(mine, want[key][:, : len(case.document)], key)

"""Replays recordings of NVIDIA/Star-Attention: every array of every ``star_*`` case (see the folder's README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.recordings import Recorded, cases, count
from helpers import GOLDEN
from jax.sharding import PartitionSpec as P

import apb_jax
from apb_jax.attention import METHODS
from apb_jax.attention.inputs import Kernels
from apb_jax.attention.placement import Placement
from apb_jax.mesh import SP
from apb_jax.model.layers import rms_norm
from apb_jax.programs import Lengths

CASES = cases("star")
pytestmark = pytest.mark.skipif(not CASES, reason=f"no star_* recordings in {GOLDEN}; set APB_GOLDEN")
STAR = METHODS["star"]


def load(folder: Path) -> tuple[dict[str, Any], list[int], list[int]]:
    inputs = np.load(folder / "inputs.npz")
    settings = json.loads((folder / "case.json").read_text())
    return settings, inputs["doc_ids"].tolist(), inputs["query_ids"].tolist()


def engine_for(folder: Path, settings: dict[str, Any], quirk: bool = False) -> apb_jax.Engine:
    model = apb_jax.load(folder.parent / settings["model"], dtype="float32")
    method = STAR(block_tokens=settings["block_size"], anchor_tokens=settings["anchor_block_size"])
    return apb_jax.Engine(model, method, apb_jax.make_mesh(sp=settings["hosts"]), bottom_right_query=quirk)


@pytest.mark.parametrize("folder", CASES)
def test_phase_one(folder: Path) -> None:
    """Ids, positions, hidden states, attention output and caches of every block of every host."""
    settings, document, query = load(folder)
    engine, hosts = engine_for(folder, settings), settings["hosts"]
    config, method = engine.model.config, engine.method
    layout = method.layout([engine.prompt(document, query)], hosts)
    lengths = Lengths.of(layout, np.asarray([len(query)], np.int32), Placement(hosts))

    def body(state: Any, tokens: Any, positions: Any, lengths: Lengths) -> Any:
        shard, model = lengths.shard(), engine.programs.model(state)
        x, found = model.embed(tokens), []
        for layer in range(config.num_layers):

            def attend(inputs: Any, _: Any) -> Any:
                out, (k, v) = method.prefill(inputs, shard, Kernels())
                return out, {"attn_out": out, "k": k, "v": v}

            rows, kept, kv = x.shape[1], layout.kept_capacity, config.num_kv_heads
            carry = {
                "attn_out": jnp.zeros((1, rows, config.num_heads, config.head_dim)),
                **{n: jnp.zeros((1, kept, kv, config.head_dim)) for n in ("k", "v")},
            }
            entering = x
            x, carry = model.run_layers(x, positions, attend, carry, start=jnp.int32(layer), count=1)
            found.append(carry | {"hidden_in": entering})
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *found)
        return jax.tree.map(lambda a: a[None], (stacked, rms_norm(x, model.norm[...], config.rms_norm_eps)))

    programs = engine.programs
    run = programs.traced(body, (programs.specs, P(None, SP), P(None, SP), P()), P(SP))
    found, final = run(engine.state, layout.tokens.reshape(1, -1), layout.positions.reshape(1, -1), lengths)
    found, final = jax.tree.map(np.asarray, (found, final))
    block, anchor = settings["block_size"], layout.segments[0][1]
    files = [Recorded(folder / f"rank{host}.npz") for host in range(hosts)]
    for host in range(hosts):
        want = files[host]
        for b in range(settings["blocks_per_host"][host]):
            rows = np.arange(anchor + b * block, anchor + (b + 1) * block)
            if host or b:  # all but the first block of all have the anchor in front
                rows = np.concatenate([np.arange(anchor), rows])
            want.equal(f"block{b}_input_ids", layout.tokens[0, host, rows])
            want.equal(f"block{b}_position_ids", layout.positions[0, host, rows])
            want.close(f"block{b}_hidden_in", found["hidden_in"][host][:, 0, rows])
            want.close(f"block{b}_attn_out", found["attn_out"][host][:, 0, rows])
            want.close(f"block{b}_final_hidden", final[host][0, rows])
        kept = layout.kept_tokens[0, host]
        want.close("cache_k", found["k"][host][:, 0, :kept])
        want.close("cache_v", found["v"][host][:, 0, :kept])
    assert count(*files) > 0


@pytest.mark.parametrize("reading", ["query_allkeys", "query_code"])
@pytest.mark.parametrize("folder", CASES)
def test_phase_two(folder: Path, reading: str) -> None:
    """Logits of the query rows, greedy tokens and the logits of every step."""
    settings, document, query = load(folder)
    want = Recorded(folder / f"{reading}.npz")
    answer = engine_for(folder, settings, quirk=reading == "query_code").generate(
        document, query, settings["steps"], stop_ids=(), logits=True
    )
    want.equal("tokens", answer.tokens)
    want.close("query_logits", answer.query_logits)
    want.close("step_logits", answer.step_logits)
    # Partial attentions of the query phase are compared in APB's replay: the rule is the same.
    partials = ("position_ids", "hidden_in", "local_out", "local_lse", "merged_out", "final_cache_k", "final_cache_v")
    assert count(want, unread=partials) > 0

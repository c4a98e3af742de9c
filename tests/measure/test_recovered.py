"""Recovered attention mass: 1 where a method is exact, the sum of the seen keys' probabilities where it is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.method_cases import CASES, DOCUMENT, QUERY, engine_on, method, model
from jax.sharding import PartitionSpec as P

from apb_jax.attention import APB, Kernels, MethodSpec
from apb_jax.attention.inputs import LayerInputs, Shard
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.placement import Placement
from apb_jax.attention.registry import METHODS
from apb_jax.attention.streaming import Streaming
from apb_jax.measure.recovered import ROWS, layer_shares, recovered_mass
from apb_jax.mesh import SP, make_mesh
from apb_jax.rope.base import rope_table
from apb_jax.rope.default import DefaultRope

DEFINED = [name for name in CASES if METHODS[name].can.true_positions]


def recovered(chosen: AttentionMethod, sp: int) -> np.ndarray | None:
    """float32 [L, H, rows], or None where it is not defined."""
    engine = engine_on(model(), sp).with_method(chosen)
    mass = recovered_mass(engine.prefill([engine.prompt(DOCUMENT, QUERY)]))
    return None if mass is None else mass.shares


@pytest.mark.parametrize("name", DEFINED)
def test_an_exact_method_recovers_everything(name: str) -> None:
    sp, fields = CASES[name].exact[-1]
    shares = recovered(method(name, **fields), sp)
    config = model().config
    per_shard = min(ROWS, config.head_dim // sp)
    assert shares is not None
    assert shares.shape[:2] == (config.num_layers, config.num_heads)
    assert shares.shape[2] in (per_shard, sp * per_shard)  # one of star's limits leaves all but one shard empty
    np.testing.assert_allclose(shares, 1, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in DEFINED if CASES[name].inexact and name != "starx"])
def test_an_inexact_one_does_not(name: str) -> None:
    """starx's prefill is star's."""
    sp, fields = CASES[name].inexact or (1, {})
    shares = recovered(method(name, **fields), sp)
    assert shares is not None
    assert 0 < shares.min() < 0.9
    assert shares.max() <= 1


def test_apb_recovers_more_the_more_it_passes() -> None:
    """Passing everything with no anchor is exact; V in the retaining heads' input must not be the probe."""
    means = []
    for passing in (0, 16, 63):
        shares = recovered(APB(anchor_tokens=0, passing_tokens=passing, embed_query=False, query_at=0), 4)
        assert shares is not None
        means.append(float(shares.mean()))
    assert means[0] < means[1] < means[2] == pytest.approx(1, abs=1e-4)


def test_methods_that_move_keys_have_no_such_number() -> None:
    for name in ("infllm", "locret"):
        sp, fields = CASES[name].exact[0]
        assert recovered(method(name, **fields), sp) is None
    assert MethodSpec("infllm").name not in DEFINED


@pytest.mark.parametrize("tp", [1, 2])
def test_tensor_parallelism_changes_nothing(tp: int) -> None:
    from apb_jax import Engine

    spec = method("star")
    engine = Engine(model(), spec, make_mesh(sp=2, tp=tp))
    mass = recovered_mass(engine.prefill([engine.prompt(DOCUMENT, QUERY)]))
    assert mass is not None
    reference = recovered(spec, 2)
    assert reference is not None
    np.testing.assert_allclose(mass.shares, reference, atol=1e-5)
    report = mass.to_json()
    assert report["mean"] == pytest.approx(float(reference.mean()), abs=1e-5)
    assert len(report["by_layer"]) == model().config.num_layers


def test_against_the_probabilities_of_a_window() -> None:
    """One layer of random q, k, v: the share is the sum of softmax probabilities over sinks and window."""
    rows, heads, kv_heads, dim, sinks, window = 97, 4, 2, 16, 3, 10
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(2 * rng.standard_normal((1, rows, n, dim)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    )
    rope = DefaultRope(10000.0)
    positions = jnp.arange(rows, dtype=jnp.int32)[None]
    x = LayerInputs(q, k, v, *rope_table(rope, dim, positions), jnp.int32(0), None, positions, rope)
    sampled = jnp.asarray([[0, 2, 5, 40, 70, 96]], jnp.int32)
    chosen = Streaming(sink_tokens=sinks, window_tokens=window)

    def body(x: LayerInputs) -> Any:
        lengths = jnp.full((1,), rows, jnp.int32)
        shard = Shard(
            jax.lax.axis_index(SP), lengths, lengths, 0 * lengths, 0 * lengths, Placement(1), (("block", rows),)
        )
        _, (kept, _) = chosen.prefill(x, shard, Kernels())
        return layer_shares(chosen, x, (kept, lengths, positions), sampled, shard, Kernels())

    alone = jax.shard_map(body, mesh=make_mesh(sp=1), in_specs=(P(),), out_specs=P(), check_vma=False)
    got = np.asarray(alone(x))[0].T
    turned_q, turned_k = (np.asarray(y, np.float64)[0] for y in x.rotated())
    for i, row in enumerate(np.asarray(sampled)[0]):
        for head in range(heads):
            scores = turned_k[: row + 1, head // 2] @ turned_q[row, head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            seen = (np.arange(row + 1) < sinks) | (np.arange(row + 1) > row - window)
            assert got[head, i] == pytest.approx((p[seen] / p.sum()).sum(), abs=1e-4)

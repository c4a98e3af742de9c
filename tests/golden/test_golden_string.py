"""Replays recordings of HKUNLP/STRING: one attention layer, prefill and decoding (see the folder's README)."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, golden_cases

from apb_jax.attention.attend import attend, project
from apb_jax.attention.decode import attend_remapped
from apb_jax.attention.inputs import Cached, CachedLayer, LayerInputs, Shard
from apb_jax.attention.placement import Placement
from apb_jax.attention.window import sliding_window
from apb_jax.rope.base import rope_table
from apb_jax.rope.from_hf import rope_from_hf
from apb_jax.rope.string import StringRope
from pallas_kernels.flash_attention import RowSegment

TOLERANCE = 1e-3  # absolute, float32; the recordings' README
CASES = golden_cases("string")
pytestmark = pytest.mark.skipif(not CASES, reason=f"no string_* recordings in {GOLDEN}; set APB_GOLDEN")


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], StringRope]:
    settings = json.loads((GOLDEN / name / "case.json").read_text())
    hf = {"rope_theta": settings["rope_theta"], "rope_scaling": settings["rope_scaling"]}
    base = rope_from_hf(hf | {"max_position_embeddings": settings["seq"]})
    rope = StringRope(
        base.theta,
        base=base,
        offset=settings["shifted_offset"],
        local=settings["local"],
        factor=settings["attention_factor"] / base.attention_factor,
    )
    return settings, dict(np.load(GOLDEN / name / "string.npz")), rope


def inputs(arrays: dict[str, np.ndarray], rope: StringRope, start: int, stop: int) -> LayerInputs:
    q, k, v = (jnp.asarray(arrays[n][None, start:stop]) for n in "qkv")
    positions = jnp.arange(start, stop, dtype=jnp.int32)[None]
    cos, sin = rope_table(rope, q.shape[-1], positions)
    return LayerInputs(q, k, v, cos, sin, jnp.int32(0), None, positions, rope)


@pytest.mark.parametrize("name", CASES)
def test_rotation(name: str) -> None:
    _, arrays, rope = load(name)
    x = inputs(arrays, rope, 0, len(arrays["q"]))
    half = x.cos.shape[-1]
    np.testing.assert_allclose(rope.inv_freq(2 * half), arrays["inv_freq"], rtol=1e-6)
    for mine, theirs in ((x.cos, arrays["cos"]), (x.sin, arrays["sin"])):
        np.testing.assert_allclose(mine[0], theirs[:, :half], rtol=0, atol=1e-5)
    np.testing.assert_allclose(project(x)[1].k[0], arrays["cached_k"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str) -> None:
    """As one causal call, and as the window that other methods build on once it covers everything."""
    settings, arrays, rope = load(name)
    rows = settings["seq"]
    queries, keys = project(inputs(arrays, rope, 0, rows))
    out, _ = attend(queries, (keys,), (RowSegment(rows, start=0, offset=0, end=rows),))
    np.testing.assert_allclose(out[0], arrays["prefill_out"], rtol=0, atol=TOLERANCE)
    # A window of 3/4 sees part of it only through the tile before: rows inside the window are untouched by the cut.
    window = 3 * rows // 4
    out, _ = sliding_window(queries, keys, window)
    np.testing.assert_allclose(out[0, :window], arrays["prefill_out"][:window], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_decoding(name: str) -> None:
    settings, arrays, rope = load(name)
    if not settings["n_decode"]:
        pytest.skip(f"{name} records no decoding")
    rows = settings["seq"]
    one = jnp.ones((1,), jnp.int32)
    shard = Shard(jnp.int32(0), rows * one, rows * one, 0 * one, one, Placement(1))
    _, prefix = project(inputs(arrays, rope, 0, rows))
    tail = project(inputs(arrays, rope, rows, rows + settings["n_decode"]))[1]
    for step in range(settings["n_decode"]):
        x = inputs(arrays, rope, rows + step, rows + step + 1)
        cached = Cached(
            document=CachedLayer.of(prefix.k, prefix.v),
            kept_tokens=rows * one,
            kept_positions=jnp.arange(rows, dtype=jnp.int32)[None],
            tail=(tail.k, tail.v),
            tail_offset=step * one,
            tail_position=rows * one,
            rows=one,
            query_tokens=None,
        )
        out, _ = attend_remapped(x, cached, shard)
        np.testing.assert_allclose(out[0, 0], arrays["decode_out"][step], rtol=0, atol=TOLERANCE)

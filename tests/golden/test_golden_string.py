"""Replays recordings of HKUNLP/STRING: one attention layer, prefill and decoding (see the folder's README)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden.recordings import TOLERANCE, Recorded, cases
from helpers import GOLDEN

from apb_jax.attention.attend import attend, project
from apb_jax.attention.decode import attend_remapped
from apb_jax.attention.inputs import Cached, CachedLayer, LayerInputs, Shard
from apb_jax.attention.placement import Placement
from apb_jax.attention.window import sliding_window
from apb_jax.rope.base import rope_table
from apb_jax.rope.from_hf import rope_from_hf
from apb_jax.rope.string import StringRope
from pallas_kernels.flash_attention import RowSegment

CASES = cases("string")
pytestmark = pytest.mark.skipif(not CASES, reason=f"no string_* recordings in {GOLDEN}; set APB_GOLDEN")


def load(folder: Path) -> tuple[dict[str, Any], Recorded, StringRope]:
    settings = json.loads((folder / "case.json").read_text())
    hf = {"rope_theta": settings["rope_theta"], "rope_scaling": settings["rope_scaling"]}
    base = rope_from_hf(hf | {"max_position_embeddings": settings["seq"]})
    rope = StringRope(
        base.theta,
        base=base,
        offset=settings["shifted_offset"],
        local=settings["local"],
        factor=settings["attention_factor"] / base.attention_factor,
    )
    return settings, Recorded(folder / "string.npz"), rope


def inputs(arrays: Recorded, rope: StringRope, start: int, stop: int) -> LayerInputs:
    q, k, v = (jnp.asarray(arrays[n][None, start:stop]) for n in "qkv")
    positions = jnp.arange(start, stop, dtype=jnp.int32)[None]
    cos, sin = rope_table(rope, q.shape[-1], positions)
    return LayerInputs(q, k, v, cos, sin, jnp.int32(0), None, positions, rope)


@pytest.mark.parametrize("folder", CASES)
def test_rotation(folder: Path) -> None:
    _, arrays, rope = load(folder)
    x = inputs(arrays, rope, 0, len(arrays["q"]))
    half = x.cos.shape[-1]
    angles = (slice(None), slice(half))
    want = ("inv_freq", rope.inv_freq(2 * half), ...), ("cos", x.cos[0], angles), ("sin", x.sin[0], angles)
    compared = 0
    for key, mine, pick in (*want, ("cached_k", project(x)[1].k[0], ...)):
        if key in arrays:
            np.testing.assert_allclose(mine, arrays[key][pick], rtol=1e-6, atol=0 if key == "inv_freq" else 1e-5)
            compared += 1
    if not compared:
        pytest.skip(f"{folder.name} records no angles")


@pytest.mark.parametrize("folder", CASES)
def test_prefill(folder: Path) -> None:
    """As one causal call, and as the window that other methods build on once it covers everything."""
    settings, arrays, rope = load(folder)
    if "prefill_out" not in arrays:
        pytest.skip(f"{folder.name} records no prefill")
    rows = settings["seq"]
    queries, keys = project(inputs(arrays, rope, 0, rows))
    out, _ = attend(queries, (keys,), (RowSegment(rows, start=0, offset=0, end=rows),))
    np.testing.assert_allclose(out[0], arrays["prefill_out"], rtol=0, atol=TOLERANCE)
    # A window of 3/4 sees part of it only through the tile before: rows inside the window are untouched by the cut.
    window = 3 * rows // 4
    out, _ = sliding_window(queries, keys, window)
    np.testing.assert_allclose(out[0, :window], arrays["prefill_out"][:window], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("folder", CASES)
def test_decoding(folder: Path) -> None:
    settings, arrays, rope = load(folder)
    if not settings["n_decode"] or "decode_out" not in arrays:
        pytest.skip(f"{folder.name} records no decoding")
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
            tail=CachedLayer.of(tail.k, tail.v),
            tail_offset=step * one,
            tail_position=rows * one,
            rows=one,
            query_tokens=None,
        )
        out, _ = attend_remapped(x, cached, shard)
        np.testing.assert_allclose(out[0, 0], arrays["decode_out"][step], rtol=0, atol=TOLERANCE)

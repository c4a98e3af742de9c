"""Layers that differ, q/k norms, and heads that a tied model stores: exact against the same thing done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_model
from hf_checkpoints import tiny_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from apb_jax.attention.inputs import LayerInputs
from apb_jax.errors import UserError
from apb_jax.model.config import LayerSpec
from apb_jax.model.layers import rms_norm
from apb_jax.rope.default import DefaultRope, NoRope
from apb_jax.weights import tied
from apb_jax.weights.checkpoint import load

ROWS = 7
SPECS = (LayerSpec(), LayerSpec(rope=NoRope()), LayerSpec(rope=NoRope()), LayerSpec(rope=DefaultRope(50.0)))


def trace(inputs: LayerInputs, carry: Any) -> tuple[jax.Array, Any]:
    """Feeds the rotated q on and keeps what the layer saw."""
    q, k = inputs.rotated()
    return q, carry.at[inputs.layer].set(k)


def test_runs_of_layers_equal_one_layer_at_a_time() -> None:
    """All at once, from a static start, from a start that only the device knows, and in groups over the borders."""
    model = random_model(num_layers=6, layers=SPECS)
    module = nnx.merge(model.graph(), model.place(None))
    x = jax.random.normal(jax.random.key(0), (1, ROWS, 32))
    positions, empty = jnp.arange(3, 3 + ROWS, dtype=jnp.int32)[None], jnp.zeros((6, 1, ROWS, 2, 16))
    assert [run.count for run in model.config.runs] == [1, 2, 1, 1, 1]
    assert model.config.spec(4) == SPECS[0]

    def groups(*sizes: int, known: bool = False) -> tuple[np.ndarray, np.ndarray]:
        state, start = (x, empty), 0
        for size in sizes:
            first = start if known else jnp.int32(start)
            state = module.run_layers(state[0], positions, trace, state[1], start=first, count=size)
            start += size
        return np.asarray(state[0]), np.asarray(state[1])

    alone = groups(*[1] * 6, known=True)
    whole = module.run_layers(x, positions, trace, empty)
    for out in (whole, groups(6), groups(6, known=True), groups(2, 4), groups(2, 4, known=True)):
        for one, other in zip(out, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    same = random_model(num_layers=6)  # the specs matter: the weights are the same
    other = nnx.merge(same.graph(), same.place(None)).run_layers(x, positions, trace, empty)
    assert np.abs(np.asarray(other[1][0]) - alone[1][0]).max() < 1e-5
    assert np.abs(np.asarray(other[1][1]) - alone[1][1]).max() > 1e-2


def test_heads_read_q_and_k_behind_their_norm(tmp_path: Path) -> None:
    """Scored heads (retaining, query) get q and k as ``LayerInputs`` holds them: normed, not yet rotated."""
    config = tiny_config("qwen3")
    model = load(write_checkpoint(tmp_path / "m", config, heads=True), dtype="float32")
    state = model.place(None)
    module = nnx.merge(model.graph(), state)
    seen: list[Any] = []

    def attend(inputs: LayerInputs, carry: Any) -> tuple[jax.Array, Any]:
        assert inputs.retaining is not None
        seen.append(1)
        return inputs.q, (inputs.q, inputs.k, inputs.retaining.hidden(inputs.q, inputs.k, inputs.v))

    x = module.embed(jnp.arange(ROWS)[None])
    empty = (jnp.zeros((1, ROWS, 4, 8)), jnp.zeros((1, ROWS, 2, 8)), jnp.zeros((1, ROWS, 8)))
    positions = jnp.arange(ROWS, dtype=jnp.int32)[None]
    _, (q, k, hidden) = module.run_layers(x, positions, attend, empty, start=0, count=1)
    weights = {
        name: state["layers"][name].get_value()[0] for name in ("attention_norm", "q", "k", "v", "q_norm", "k_norm")
    }
    h = rms_norm(x, weights["attention_norm"], config.rms_norm_eps)
    flat = {name: jnp.matmul(h, weights[name], precision="highest").reshape(1, ROWS, -1, 8) for name in "qkv"}
    normed = {name: rms_norm(flat[name], weights[f"{name}_norm"], config.rms_norm_eps) for name in "qk"}
    np.testing.assert_allclose(q, normed["q"], atol=1e-5)
    np.testing.assert_allclose(k, normed["k"], atol=1e-5)
    parts = [(normed["q"], "fc1_q"), (normed["k"], "fc1_k"), (flat["v"], "fc1_v")]
    want = sum(part.reshape(1, ROWS, -1) @ state["layers"][name].get_value()[0] for part, name in parts)
    np.testing.assert_allclose(hidden, want, atol=1e-5)
    with pytest.raises(UserError, match="cannot be folded: its q and k are normalised"):
        load(tmp_path / "m", fold_heads=True)


@pytest.mark.parametrize("block_bytes", [tied.BLOCK_BYTES, 100])  # at once, and a few rows at a time
def test_a_tied_model_may_store_an_equal_head(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied, "BLOCK_BYTES", block_bytes)
    folder = write_checkpoint(tmp_path / "m", tiny_config(tie_embeddings=True))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    assert "head" not in load(folder).shapes()
    load(folder).place(None)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lm_head.weight.*tie_word_embeddings.*the two differ"):
        load(folder)

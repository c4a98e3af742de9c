"""Folded retaining heads: the same scores as the unfolded ones, on every way of loading, and no less exact in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_checkpoints import tiny_config, write_checkpoint
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file

from apb_jax.attention.inputs import LayerInputs
from apb_jax.errors import UserError
from apb_jax.model.layers import Where
from apb_jax.model.weights import partition_specs
from apb_jax.weights.checkpoint import LoadedModel, load
from converters.__main__ import main

ROWS = 40


def scores(model: LoadedModel, mesh: Mesh | None = None) -> np.ndarray:
    """Raw retaining scores of every layer, float32 [L, B, S, K], the layers fed by each other without attention."""
    config = model.config
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, config.vocab_size, (2, ROWS), dtype=np.int32))
    positions = jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32), (2, ROWS))
    graph, state = model.graph(), model.place(mesh)
    tp_axis = "tp" if mesh else None
    kv_heads = config.num_kv_heads // (mesh.shape["tp"] if mesh else 1)

    def attend(x: LayerInputs, carry: Array) -> tuple[Array, Array]:
        assert x.retaining is not None
        hidden = x.retaining.hidden(x.q, x.k, x.v, x.tp_axis)
        score = jnp.matmul(jax.nn.silu(hidden), x.retaining.fc2, preferred_element_type=jnp.float32)
        return x.q, jax.lax.dynamic_update_index_in_dim(carry, score.astype(jnp.float32), x.layer, 0)

    def run(state: Any, tokens: Array) -> Array:
        module = nnx.merge(graph, state)
        carry = jnp.zeros((config.num_layers, 2, ROWS, kv_heads), jnp.float32)
        if mesh:
            carry = jax.lax.pcast(carry, ("tp",), to="varying")
        return module.run_layers(module.embed(tokens), positions, attend, carry, where=Where(tp_axis))[1]

    if mesh is None:
        return np.asarray(jax.jit(run)(state, tokens))
    spec = PartitionSpec(None, None, None, "tp")
    whole = jax.shard_map(
        run, mesh=mesh, in_specs=(partition_specs(state), PartitionSpec()), out_specs=spec, check_vma=False
    )
    return np.asarray(jax.jit(whole)(state, tokens))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(request.param, hidden_size=96, num_heads=8, num_kv_heads=4, head_dim=16)
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "in", config, heads=True)


def test_folded_scores_are_the_same(source: Path) -> None:
    plain = scores(load(source, dtype="float32"))
    folded = load(source, dtype="float32", fold_heads=True)
    assert np.abs(plain).max() > 0.05
    assert "layers.fc1_q" not in folded.shapes()
    np.testing.assert_allclose(scores(folded), plain, rtol=0, atol=2e-6)
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2), ("sp", "tp"))
    np.testing.assert_allclose(scores(folded, mesh), plain, rtol=0, atol=2e-6)


def test_folding_costs_no_precision_in_bf16(source: Path) -> None:
    exact = scores(load(source, dtype="float32"))  # the files are bf16: the same weights
    error = {
        fold: np.sqrt(np.mean(np.square(scores(load(source, dtype="bf16", fold_heads=fold)) - exact)))
        for fold in (False, True)
    }
    assert 0 < error[True] <= 2 * error[False], error


def test_folded_conversion(source: Path, tmp_path: Path) -> None:
    assert main(["hf", str(source), "--out", str(tmp_path / "o"), "--fold-heads"]) == 0
    assert main(["hf", str(source), "--out", str(tmp_path / "o"), "--fold-heads"]) == 0
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 2  # another conversion
    stored = load(tmp_path / "o", dtype="bf16")
    assert stored.fold_heads
    np.testing.assert_array_equal(scores(stored), scores(load(source, dtype="bf16", fold_heads=True)))
    unfolded = load(tmp_path / "o", dtype="bf16", fold_heads=False)
    np.testing.assert_array_equal(scores(unfolded), scores(load(source, dtype="bf16")))
    assert main(["export", str(tmp_path / "o"), "--out", str(tmp_path / "back")]) == 0
    for file in ("model.safetensors", "retaining_heads.safetensors"):
        back = load_file(tmp_path / "back" / file)
        for name, array in load_file(source / file).items():
            np.testing.assert_array_equal(array.view(np.uint16), back[name].view(np.uint16))


def test_nothing_to_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_checkpoint(tmp_path / "in")
    with pytest.raises(UserError, match="no retaining heads to fold"):
        load(bare, fold_heads=True)
    assert main(["hf", str(bare), "--out", str(tmp_path / "o"), "--fold-heads"]) == 2
    assert "no retaining heads to fold" in capsys.readouterr().err

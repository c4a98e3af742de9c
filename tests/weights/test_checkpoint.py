"""Loading: folders onto meshes, bit for bit; staging in pieces; bad folders get one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT
from hf_checkpoints import tiny_config, write_checkpoint
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from apb_jax.errors import UserError
from apb_jax.presets import MODELS
from apb_jax.weights import stream
from apb_jax.weights.checkpoint import load
from apb_jax.weights.tokenizer import load_tokenizer

GOLDEN = Path(os.environ.get("APB_GOLDEN", "../shared/golden"))


def mesh(sp: int, tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: sp * tp]).reshape(sp, tp), ("sp", "tp"))


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(state)
    return {".".join(path): np.asarray(leaf.get_value()) for path, leaf in flat}


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The parameters put together by hand from the HF names."""
    t = {n: a for f in sorted(folder.glob("*.safetensors")) for n, a in load_file(f).items()}
    config = tiny_config()
    qd, kd = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def stack(name: str, turn: bool = True) -> np.ndarray:
        layers = [t[f"model.layers.{i}.{name}.weight"] for i in range(config.num_layers)]
        return np.stack([layer.T if turn else layer for layer in layers])

    out = {
        "embedding": t["model.embed_tokens.weight"],
        "norm": t["model.norm.weight"],
        "head": t["lm_head.weight"].T,
        "layers.attention_norm": stack("input_layernorm", False),
        "layers.mlp_norm": stack("post_attention_layernorm", False),
    }
    out |= {f"layers.{n}": stack(f"self_attn.{n}_proj") for n in "qkvo"}
    out |= {f"layers.{n}": stack(f"mlp.{n}_proj") for n in ("gate", "up", "down")}
    fc1 = stack("self_attn.fc1")
    parts = np.split(fc1, [qd, qd + kd], axis=1)
    out |= dict(zip(("layers.fc1_q", "layers.fc1_k", "layers.fc1_v"), parts, strict=True))
    return out | {"layers.fc2": stack("self_attn.fc2")}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("staging", [None, 2500])
def test_place_is_exact_on_every_mesh(
    shards: int, staging: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if staging:  # one layer of the larger matrices at a time, all layers of the norms
        monkeypatch.setattr(stream, "STAGING_BYTES", staging)
    folder = write_checkpoint(tmp_path / "model", heads=True, shards=shards)
    want = expected(folder)
    model = load(folder, dtype="bf16")
    assert model.retaining_hidden == 8
    for where in (None, mesh(4, 2)):
        seen: list[tuple[int, int]] = []
        state = model.place(where, lambda done, total, seen=seen: seen.append((done, total)))
        got = arrays(state)
        assert got.keys() == want.keys()
        for path, array in want.items():
            assert got[path].dtype == array.dtype
            np.testing.assert_array_equal(got[path].view(np.uint16), array.view(np.uint16), err_msg=path)
        assert seen[-1][0] == seen[-1][1] == sum(array.nbytes for array in want.values())
    q = state["layers"]["q"].get_value()
    assert {s.data.shape for s in q.addressable_shards} == {(3, 24, 16)}
    nnx.merge(model.graph(), state)


def test_transposing_on_the_device_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that accelerators take, run on CPU devices."""
    folder = write_checkpoint(tmp_path / "model", heads=True)
    monkeypatch.setattr(stream, "HOST_TRANSPOSES", frozenset())
    for staging in (stream.STAGING_BYTES, 2500):
        monkeypatch.setattr(stream, "STAGING_BYTES", staging)
        got = arrays(load(folder, dtype="bf16").place(mesh(2, 2)))
        for path, array in expected(folder).items():
            np.testing.assert_array_equal(got[path].view(np.uint16), array.view(np.uint16), err_msg=path)


def test_dtypes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    want = expected_f32 = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    got = arrays(load(folder).place(None))["embedding"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected_f32.astype(np.float32))
    assert want.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="choose bf16 or float32"):
        load(folder, dtype="int4")


def test_tied_embeddings(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(tie_embeddings=True))
    assert "head" not in arrays(load(folder).place(None))


def test_random_weights_are_placed_by_the_devices(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model = load(folder, weights="random", dtype="bf16")
    one, many = arrays(model.place(None)), arrays(model.place(mesh(2, 2)))
    for path, array in one.items():
        np.testing.assert_array_equal(array.view(np.uint16), many[path].view(np.uint16))
    assert one["layers.q"].astype(np.float32).std() > 0.1


def test_tp_must_divide(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=True)
    with pytest.raises(UserError, match=r"tp=4 does not divide layers.fc2 .* divides 2 KV heads"):
        load(folder).place(mesh(2, 4))


def test_heads_of_another_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    wide = write_checkpoint(tmp_path / "wide", tiny_config(num_heads=8), heads=True)
    deep = write_checkpoint(tmp_path / "deep", tiny_config(num_layers=4), heads=True)
    with pytest.raises(UserError, match=r"\(8, 96\).*needs \(8, 64\).*heads of another model"):
        load(folder, heads=wide / "retaining_heads.safetensors")
    with pytest.raises(UserError, match="for 4 layers; this model has 3"):
        load(folder, heads=deep / "retaining_heads.safetensors")
    with pytest.raises(UserError, match="holds no retaining heads"):
        load(folder, heads=folder / "model.safetensors")


def test_damaged_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged, words in (
        (whole[:-10], "is truncated: its header promises"),
        (whole[:50], "is truncated: its header alone"),
        (whole[:4], "not a safetensors file"),
        (b"PK" * 100, "not a safetensors file"),
        (whole + b"x", "1 bytes after its last tensor"),
        (whole[:8] + b"}" + whole[9:], "header does not parse"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


def test_damaged_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / "model-00002-of-00003.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"names 3 files; missing: model-00002-of-00003.safetensors"):
        load(folder)
    (folder / "elsewhere").rename(folder / "model-00002-of-00003.safetensors")
    name = next(iter(content["weight_map"]))
    other = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"}
    content["weight_map"][name] = (other - {content["weight_map"][name]}).pop()
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"holds tensor '{name}'; it does not"):
        load(folder)


@pytest.mark.skipif(not (GOLDEN / "models" / "llama_a").is_dir(), reason=f"no golden models in {GOLDEN}")
def test_golden_model_loads() -> None:
    model = load(GOLDEN / "models" / "llama_a")
    assert model.retaining_hidden == 1024
    assert arrays(model.place(mesh(4, 2)))["layers.fc2"].shape == (2, 1024, 2)


def test_float32_files_stay_float32(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", dtype=np.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors["model.layers.1.self_attn.q_proj.weight"].astype(
        np.float16
    )
    save_file(tensors, folder / "model.safetensors")  # one half-precision layer among float32 ones
    got = arrays(load(folder).place(None))["layers.q"]
    for layer in range(3):
        want = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(got[layer], want)


# --- the four kinds of names ---


def hub_cache(root: Path, hub_id: str, revision: str = "a" * 40) -> Path:
    """The folder that the hub library would have filled for a snapshot."""
    repository = root / ("models--" + hub_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return repository / "snapshots" / revision


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_hub_id_from_the_cache(offline_hub: Path) -> None:
    write_checkpoint(hub_cache(offline_hub, "someone/tiny-llama"), shards=2)
    model = load("someone/tiny-llama")
    assert model.name == "someone/tiny-llama"
    assert model.config == tiny_config()


def test_hub_blobs_are_checked_by_their_names(offline_hub: Path, tmp_path: Path) -> None:
    from converters.convert import convert_model

    snapshot = hub_cache(offline_hub, "someone/tiny-llama")
    write_checkpoint(snapshot)
    file = snapshot / "model.safetensors"
    blob = snapshot.parent.parent / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    convert_model("someone/tiny-llama", tmp_path / "good")
    manifest = json.loads((tmp_path / "good" / "apb_jax_manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("someone/tiny-llama", "a" * 40)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        convert_model("someone/tiny-llama", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_hub_id_offline_says_what_to_do(offline_hub: Path) -> None:
    for name, hub_id in (("someone/absent", "someone/absent"), ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3")):
        with pytest.raises(UserError) as caught:
            load(name)
        assert f"hf download {hub_id} --local-dir DIR" in str(caught.value)
        assert f"give DIR instead of '{name}'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_incomplete_snapshot_is_not_a_model(offline_hub: Path) -> None:
    snapshot = hub_cache(offline_hub, "someone/tokenizer-only")
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="hf download someone/tokenizer-only"):
        load("someone/tokenizer-only")


def test_presets(offline_hub: Path, tmp_path: Path) -> None:
    model = load("llama3.1-8b", weights="random")
    assert model.config == MODELS["llama3.1-8b"].config
    assert model.retaining_hidden == 1024  # it has published heads of this width
    assert load("mistral-7b", weights="random").retaining_hidden is None
    folder = write_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match="is not 'mistral-7b': its family is llama, the preset's is mistral"):
        load("mistral-7b", weights=folder)


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("llama3.1-8", "did you mean 'llama3.1-8b'"),
        ("empty", "holds no config.json"),
        ("./nowhere/x", "no folder, no GGUF file, and no hub id"),
    ):
        with pytest.raises(UserError, match=words):
            load(name)
    with pytest.raises(UserError, match="no such file, and no hub id"):
        load(write_checkpoint(tmp_path / "model"), heads="heads.bin")


def test_a_general_tokenizer_is_the_one_that_transformers_chooses() -> None:
    """It loads without AutoTokenizer's imports: starting with the packaged model needs no PyTorch, even where it is."""
    from transformers import AutoTokenizer

    folder = ROOT / "apb_jax" / "tiny"
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours is not None
    text = "The pass key of Zoë is 8,652,300,018.\n\tVAR ABCDE = 5"
    assert ours(text) == theirs(text)
    assert ours.special_tokens_map == theirs.special_tokens_map
    loaded = "import sys, apb_jax; apb_jax.load('tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=False).returncode == 0

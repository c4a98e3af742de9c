"""``python -m converters gguf``: the folder holds the file's values and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from dense import our_logits
from gguf_files import HF, Kind, tensors_of, write_gguf
from safetensors.numpy import load_file

from apb_jax.model.config import ModelConfig
from apb_jax.weights.checkpoint import load
from converters import gguf as command
from converters.__main__ import main


@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_folder_is_the_file(shard_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shard_bytes:
        monkeypatch.setattr(command, "SHARD_BYTES", shard_bytes)
    tensors = tensors_of(ModelConfig.from_hf(HF | {"model_type": "llama"}))
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, kind=Kind.F16)
    out = tmp_path / "out"
    assert main(["gguf", str(file), "--out", str(out)]) == 0
    assert (out / "model.safetensors.index.json").exists() == bool(shard_bytes)
    assert load(out).config == load(file).config
    ids = jnp.asarray(np.random.default_rng(2).integers(0, HF["vocab_size"], (1, 23), dtype=np.int32))
    logits = [our_logits(load(source, dtype="float32"), ids)[0] for source in (file, out)]
    np.testing.assert_array_equal(*logits)
    written = {name: array for part in out.glob("*.safetensors") for name, array in load_file(part).items()}
    for name, tensor in tensors.items():
        expected = tensor if tensor.ndim == 1 else tensor.astype("float16")
        assert written[name].dtype == expected.dtype
        assert (written[name] == expected).all()
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2]}


def test_wrong_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gguf", "tiny", "--out", str(tmp_path / "o")]) == 2
    assert "no GGUF file" in capsys.readouterr().err
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert main(["gguf", str(tmp_path / "x.gguf"), "--out", str(tmp_path / "o")]) == 2
    assert "ends inside the version" in capsys.readouterr().err
    assert not list(tmp_path.glob("o*"))

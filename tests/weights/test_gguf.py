"""GGUF files: values and logits of the HF model they were made from; what is not computed is named in a line."""

from __future__ import annotations

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flax import nnx
from gguf_files import HF, Kind, tensors_of, write_gguf
from safetensors.numpy import save_file

from apb_jax.errors import UserError
from apb_jax.model.config import FAMILIES, ModelConfig
from apb_jax.run import main
from apb_jax.weights import gguf_file
from apb_jax.weights.checkpoint import LoadedModel, load
from apb_jax.weights.gguf_header import read_gguf_header

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 256,
    },
    "qwen3": {},
}
YARN = {
    "qwen2.rope.scaling.type": "yarn",
    "qwen2.rope.scaling.factor": 4.0,
    "qwen2.rope.scaling.original_context_length": 64,
}


def hf_config(case: str) -> dict[str, Any]:
    family = case.split("-")[0]
    if family not in FAMILIES:
        pytest.skip(f"family {family} is not there yet")
    return HF | {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]} | CASES[case]


def write_pair(case: str, folder: Path, kind: Kind = Kind.F32) -> tuple[Path, Path]:
    """(GGUF file, HF folder) of the same model."""
    hf = hf_config(case)
    config = ModelConfig.from_hf(hf)
    tensors = tensors_of(config)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    settings = YARN if case == "qwen2-yarn" else {}
    return write_gguf(folder / "m.gguf", config.family, tensors, kind=kind, settings=settings), folder / "hf"


def arrays(model: LoadedModel) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(model.place(None))}


def same(one: LoadedModel, other: LoadedModel) -> None:
    mine, theirs = arrays(one), arrays(other)
    assert mine.keys() == theirs.keys()
    for path, array in mine.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_file_is_the_model_it_was_made_from(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", 4 * 96 * 7)  # seven rows at a time: no divisor of anything
    file, folder = write_pair(case, tmp_path)
    from_file, from_folder = load(file), load(folder)
    assert from_file.config == from_folder.config
    assert from_file.name == "m"
    same(from_file, from_folder)


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: transformers' own reading needs it")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    import jax.numpy as jnp
    import torch
    from dense import our_logits
    from transformers import AutoModelForCausalLM

    file, folder = write_pair(case, tmp_path)
    ids = np.random.default_rng(1).integers(0, HF["vocab_size"], (1, 37), dtype=np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(expected).max() > 1
    (got,) = our_logits(load(file, dtype="float32"), jnp.asarray(ids))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
def test_kinds_are_dequantised_as_the_package_does(kind: Kind, tmp_path: Path) -> None:
    file, folder = write_pair("llama", tmp_path, kind)
    model = load(file, dtype="float32")
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    rounded = {
        name: tensor if tensor.ndim == 1 else gguf.dequantize(gguf.quantize(tensor, kind), kind)
        for name, tensor in tensors.items()
    }
    save_file(rounded, folder / "model.safetensors")
    same(model, load(folder, dtype="float32"))


def test_header_is_what_the_packages_reader_sees(tmp_path: Path) -> None:
    file, _ = write_pair("llama", tmp_path, Kind.Q8_0)
    mine, theirs = read_gguf_header(file), gguf.GGUFReader(file)
    assert mine.settings == {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    for tensor in theirs.tensors:
        own = mine.tensors[tensor.name]
        assert own.shape == tuple(reversed(tensor.shape.tolist()))
        assert (own.kind, own.offset, own.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert len(mine.tensors) == len(theirs.tensors)


# --- the divisors of the llama3 rule ---


def llama3_divisors(factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them (``Llama3`` of ``convert_hf_to_gguf.py``)."""
    frequencies = 1.0 / (HF["rope_theta"] ** (np.arange(0, HF["head_dim"], 2, dtype=np.float32) / HF["head_dim"]))
    out = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else middle)
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_are_recognised(factor: float, tmp_path: Path) -> None:
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    divisors = llama3_divisors(factor)
    assert len(set(divisors.tolist())) > 2  # the middle band is there
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, extra={"rope_freqs.weight": divisors})
    rope = load(file).config.rope
    assert rope.to_hf() == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_divisors_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    divisors = llama3_divisors(8.0)
    for number, (changed, words) in enumerate(
        [
            (np.where(divisors == 8, 8, divisors * 1.01), "not the divisors of the llama3 rule"),
            (divisors[:-1], "not the divisors of the llama3 rule"),
            (divisors * np.nan, "finite and positive"),
        ]
    ):
        file = write_gguf(
            tmp_path / f"{number}.gguf", "llama", tensors, extra={"rope_freqs.weight": changed.astype(np.float32)}
        )
        with pytest.raises(UserError, match=words):
            load(file)
    ones = np.ones(16, np.float32)
    assert (
        load(write_gguf(tmp_path / "ones.gguf", "llama", tensors, extra={"rope_freqs.weight": ones})).config
        == load(write_gguf(tmp_path / "none.gguf", "llama", tensors)).config
    )


# --- what is refused, each by its key ---

REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], list[str]]] = {
    "architecture": ({"general.architecture": "gemma2"}, {}, ["general.architecture='gemma2'", "llama, qwen2, qwen3"]),
    "experts": ({"llama.expert_count": 8}, {}, ["llama.expert_count=8"]),
    "window": ({"llama.attention.sliding_window": 4096}, {}, ["llama.attention.sliding_window=4096"]),
    "part of a head": ({"llama.rope.dimension_count": 8}, {}, ["llama.rope.dimension_count=8", "32"]),
    "other values": ({"llama.attention.value_length": 16}, {}, ["llama.attention.value_length=16"]),
    "new key": ({"llama.brand_new": "x"}, {}, ["llama.brand_new='x'"]),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, {}, ["longrope"]),
    "old linear": ({"llama.rope.scale_linear": 4.0}, {}, ["llama.rope.scale_linear=4.0"]),
    "heads by layer": ({"llama.attention.head_count": [6, 4]}, {}, ["llama.attention.head_count=[6, 4]"]),
    "lacks a key": ({"llama.block_count": None}, {}, ["lacks llama.block_count"]),
    "text for a number": ({"llama.block_count": "two"}, {}, ["llama.block_count='two'"]),
    "adapter": ({"general.type": "adapter"}, {}, ["general.type='adapter'", "LoRA"]),
    "one of many": ({"split.count": 3}, {}, ["split.count=3", "merge"]),
    "too many layers": ({"llama.block_count": 3}, {}, ["model.layers.2.", "no file"]),
    "too few layers": ({"llama.block_count": 1}, {}, ["model.layers.1.", "layers 0 to 0"]),
    "another width": ({"llama.embedding_length": 32}, {}, ["(61, 96)", "(61, 32)"]),
    "another head count": ({"llama.attention.head_count": 8}, {}, ["blk.0.attn_q.weight", "(192, 96)", "256 rows"]),
    "unknown tensor": ({}, {"blk.0.ffn_gate_exps.weight": np.ones((2, 4), np.float32)}, ["blk.0.ffn_gate_exps.weight"]),
    "bias of llama": ({}, {"blk.0.attn_q.bias": np.ones(192, np.float32)}, ["attention_bias"]),
    "kind": ({}, {"blk.0.attn_norm.weight.x": np.ones(4, np.int32)}, ["blk.0.attn_norm.weight.x", "I32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, extra, words = REFUSED[case]
    architecture = settings.get("general.architecture", "llama")
    own = {key: value for key, value in settings.items() if key != "general.architecture"}
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    file = write_gguf(tmp_path / "m.gguf", architecture, tensors, settings=own, extra=extra)
    with pytest.raises(UserError) as caught:
        load(file)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(write_gguf(tmp_path / "m.gguf", "llama", tensors))


# --- damaged files ---


def change(raw: bytes, at: int, code: str, value: int) -> bytes:
    return raw[:at] + struct.pack(code, value) + raw[at + struct.calcsize(code) :]


def first_kind(raw: bytes) -> int:
    """Where the kind of the first tensor in the table lies: after its name, dimensions and two sizes."""
    start = raw.index(b"token_embd.weight") + len(b"token_embd.weight")
    return start + 4 + 16


DAMAGED: dict[str, tuple[Any, list[str]]] = {
    "magic": (lambda raw: b"GGML" + raw[4:], ["not a GGUF file", "GGML"]),
    "empty": (lambda raw: b"", ["not a GGUF file"]),
    "only magic": (lambda raw: raw[:4], ["ends inside the version"]),
    "half a header": (lambda raw: raw[:300], ["damaged or truncated"]),
    "last byte": (lambda raw: raw[:-40], ["is truncated", "copy or download it again"]),
    "version 1": (lambda raw: change(raw, 4, "<I", 1), ["version 1", "2 and 3"]),
    "big-endian": (lambda raw: change(raw, 4, ">I", 3), ["big-endian"]),
    "tensors": (lambda raw: change(raw, 8, "<Q", 2**63), [f"{2**63} tensors"]),
    "settings": (lambda raw: change(raw, 16, "<Q", 2**40), [f"{2**40} settings"]),
    "string": (lambda raw: change(raw, 24, "<Q", 2**62), [f"{2**62} bytes"]),
    "type": (lambda raw: change(raw, 24 + 8 + len("general.architecture"), "<I", 99), ["type 99"]),
    "kind": (lambda raw: change(raw, first_kind(raw), "<I", 777), ["quantisation 777", "token_embd.weight"]),
    "row": (lambda raw: change(raw, first_kind(raw) - 20, "<I", 9), ["9 dimensions"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_one_line_and_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGED[case]
    file, _ = write_pair("llama", tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert main(["--model", str(file), "--seq", "64", "--sp", "1"]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in [str(file), *words]:
        assert word in lines[0]


def test_any_prefix_of_a_header_is_refused(tmp_path: Path) -> None:
    file, _ = write_pair("llama", tmp_path)
    raw = file.read_bytes()
    for length in range(0, 2000, 7):
        file.write_bytes(raw[:length])
        with pytest.raises(UserError):
            read_gguf_header(file)


def test_list_longer_than_the_file(tmp_path: Path) -> None:
    tensors = tensors_of(ModelConfig.from_hf(hf_config("llama")))
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, settings={"x.list": [1, 2, 3]})
    raw = file.read_bytes()
    at = raw.index(b"x.list") + len(b"x.list") + 8
    file.write_bytes(change(raw, at, "<Q", 2**61))
    with pytest.raises(UserError, match=rf"{2**61} values of x.list"):
        load(file)

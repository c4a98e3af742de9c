"""GGUF files made in tests with the ``gguf`` package's own writer, from tensors under HF names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from hf_checkpoints import random_tensors

from apb_jax.model.config import ModelConfig
from apb_jax.weights.gguf_file import LAYER_NAMES, NAMES
from apb_jax.weights.mapping import rules_for

Kind = gguf.GGMLQuantizationType
NAME_OF = {hf: name for name, hf in NAMES.items()}
LAYER_NAME_OF = {hf: name for name, hf in LAYER_NAMES.items()}
HF: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 256, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""config.json of every case, but for its family."""


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Float32 tensors by HF name, large enough that every one matters."""
    tensors = random_tensors(config, rules_for(config), np.float32, seed=5)
    return {name: (value + 1 if "norm" in name else value * 2).astype(np.float32) for name, value in tensors.items()}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if name in NAME_OF:
        return NAME_OF[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAME_OF[inner]}"


def pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The turn of q and k that llama.cpp's converter makes (``LlamaModel.permute``)."""
    return matrix.reshape(heads, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


def write_gguf(
    file: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    *,
    kind: Kind = Kind.F32,
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file of the model ``HF``. ``settings``: keys more or other (None: left out); ``extra``: GGUF names."""
    values: dict[str, Any] = {
        f"{architecture}.context_length": HF["max_position_embeddings"],
        f"{architecture}.embedding_length": HF["hidden_size"],
        f"{architecture}.block_count": HF["num_hidden_layers"],
        f"{architecture}.feed_forward_length": HF["intermediate_size"],
        f"{architecture}.attention.head_count": HF["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": HF["num_key_value_heads"],
        f"{architecture}.attention.key_length": HF["head_dim"],
        f"{architecture}.attention.value_length": HF["head_dim"],
        f"{architecture}.rope.dimension_count": HF["head_dim"],
        f"{architecture}.rope.freq_base": HF["rope_theta"],
        f"{architecture}.attention.layer_norm_rms_epsilon": HF["rms_norm_eps"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | dict(settings or {})
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HF["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = pairs(tensor, heads)
        used = kind if tensor.ndim > 1 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(tensor, used), raw_dtype=used)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

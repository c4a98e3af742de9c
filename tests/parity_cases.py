"""Tiny models of every family and rope kind, configured as their published checkpoints are; weights from a seed.

``python tests/parity_cases.py [NAME ...]`` (needs torch) records the logits of transformers into ``recorded/``, for
machines without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hf_checkpoints import random_tensors
from safetensors.numpy import load_file, save_file

from apb_jax.model.config import ModelConfig
from apb_jax.weights.mapping import rules_for

RECORDED = Path(__file__).parent / "model" / "recorded"
PROMPT_LENGTHS = (5, 23, 64)

_SHARED = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-3.1": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 256,
        "head_dim": 32,  # enough frequencies that all three bands of the rule have some
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": [2, 3],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
    },
    "llama": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 1048576,
        "rope_theta": 3580165449.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
    },
    "qwen2-yarn": _SHARED
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32,
        "max_window_layers": 3,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
    },
    "yi": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 200000,
        "rope_theta": 5000000.0,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "mistral": _SHARED
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "head_dim": 16,
    },
    "qwen3": _SHARED
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "max_position_embeddings": 40960,
        "max_window_layers": 3,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "smollm3": _SHARED
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 2,
        "no_rope_layers": [1, 0, 1],
        "pad_token_id": 1,
        "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "llama-linear": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 128,
        "rope_scaling": {"factor": 2.5, "type": "linear"},
    },
}
"""config.json by name, in the notation of the published files (``rope_theta`` and ``rope_scaling``)."""


def write_model(name: str, folder: Path) -> Path:
    """The HF folder of a case."""
    config = ModelConfig.from_hf(FAMILIES[name])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FAMILIES[name]))
    tensors = random_tensors(config, rules_for(config), np.float32, seed=7)
    for tensor in tensors:  # norms around one, biases and matrices large enough to matter
        if "norm" in tensor:
            tensors[tensor] += 1
    save_file({key: np.ascontiguousarray(value * 1.5) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def prompts(name: str) -> list[np.ndarray]:
    """Token ids, int32 [1, S], of three lengths."""
    rng = np.random.default_rng(11)
    return [rng.integers(0, FAMILIES[name]["vocab_size"], (1, n), dtype=np.int32) for n in PROMPT_LENGTHS]


def checksum(folder: Path) -> float:
    """Tells whether this machine's random generator made the recorded weights."""
    return float(
        sum(np.abs(tensor).astype(np.float64).sum() for tensor in load_file(folder / "model.safetensors").values())
    )


def transformers_logits(folder: Path, name: str) -> list[np.ndarray]:
    """What transformers computes in float32 with eager attention; [1, S, V] per prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.from_numpy(ids).long()).logits.numpy() for ids in prompts(name)]


def record(work: Path, names: list[str]) -> None:
    """Write ``recorded/<name>.npz`` for these cases."""
    import torch
    import transformers

    RECORDED.mkdir(exist_ok=True)
    for name in names or FAMILIES:
        folder = write_model(name, work / name)
        logits = transformers_logits(folder, name)
        np.savez_compressed(
            RECORDED / f"{name}.npz",
            *logits,
            checksum=checksum(folder),
            versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        )


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        record(Path(work), sys.argv[1:])

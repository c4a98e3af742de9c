"""Tiny random HF checkpoints for tests, written with the safetensors library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from apb_jax.model.config import LayerSpec, ModelConfig
from apb_jax.model.families import FAMILIES
from apb_jax.rope.default import DefaultRope
from apb_jax.weights.mapping import RETAINING_HEADS, Rule, rules_for, sizes_of

RETAINING_HIDDEN = 8


def tiny_config(family: str = "llama", **changes: Any) -> ModelConfig:
    """Two layers, four heads, two KV heads."""
    settings: dict[str, Any] = {
        "family": family,
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rope": DefaultRope(10000.0),
        "rms_norm_eps": 1e-5,
        "max_positions": 256,
        "qkv_bias": FAMILIES[family].qkv_bias,
        "layers": (LayerSpec(qk_norm=FAMILIES[family].qk_norm),),
    }
    return ModelConfig(**(settings | changes))


def random_tensors(
    config: ModelConfig, rules: tuple[Rule, ...], dtype: Any = ml_dtypes.bfloat16, seed: int = 0
) -> dict[str, np.ndarray]:
    """HF name -> array for every tensor that ``rules`` read."""
    rng = np.random.default_rng(seed)
    sizes = sizes_of(config, RETAINING_HIDDEN)
    return {
        name: (rng.standard_normal(rule.hf_shape(sizes)) * 0.1).astype(dtype)
        for rule in rules
        for name in rule.names(config.num_layers)
    }


def write_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    heads: bool = False,
    shards: int = 1,
    dtype: Any = ml_dtypes.bfloat16,
) -> Path:
    """An HF folder; ``shards`` > 1 writes an index file too."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = random_tensors(config, rules_for(config), dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if heads:
        save_file(random_tensors(config, RETAINING_HEADS, dtype, 1), folder / "retaining_heads.safetensors")
    return folder

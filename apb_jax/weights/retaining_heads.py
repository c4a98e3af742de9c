"""Retaining heads in files: which tensors they are, and whether they belong to a model.

Original names (Locret, APB), no biases: ``model.layers.N.self_attn.fc1.weight`` [F, (H+2K)*D], ``.fc2.weight`` [K, F].
A file may hold the whole model (the trainer's final save); only these names are taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.weights.mapping import WrongShape, collect
from apb_jax.weights.safetensors_header import TensorEntry, read_header
from apb_jax.weights.torch_bin import read_torch_bin

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
HEAD_NAME = re.compile(r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<matrix>fc[12])\.weight")


def split_heads(
    entries: Mapping[str, TensorEntry],
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """(the model's tensors, the retaining heads' tensors)."""
    heads = {name: entry for name, entry in entries.items() if HEAD_NAME.fullmatch(name)}
    return {name: entry for name, entry in entries.items() if name not in heads}, heads


def read_heads(file: Path) -> dict[str, TensorEntry]:
    """The retaining heads in a safetensors or torch file, headers only."""
    if not file.is_file():
        raise UserError(f"retaining heads {file}: no such file")
    reader = read_torch_bin if file.suffix in TORCH_SUFFIXES else read_header
    heads = split_heads(collect(reader(file)))[1]
    if not heads:
        raise UserError(f"{file} holds no retaining heads (names like model.layers.0.self_attn.fc1.weight)")
    return heads


def check_heads(heads: Mapping[str, TensorEntry], config: ModelConfig) -> int:
    """The heads' hidden width F; heads of another model are refused with both shapes."""
    layers = {int(HEAD_NAME.fullmatch(name)["layer"]) for name in heads}  # type: ignore[index]
    if max(layers) + 1 != config.num_layers:
        file = next(iter(heads.values())).file
        raise UserError(
            f"{file} holds retaining heads for {max(layers) + 1} layers; this model has {config.num_layers}: "
            "these are the heads of another model"
        )
    hidden = next((entry.shape[0] for name, entry in heads.items() if ".fc1." in name), 0)
    expected = {"fc1": (hidden, config.retaining_width), "fc2": (config.num_kv_heads, hidden)}
    for name, entry in heads.items():
        want = expected[HEAD_NAME.fullmatch(name)["matrix"]]  # type: ignore[index]
        if entry.shape != want:
            raise WrongShape(
                f"{entry.file}: {name!r} has shape {entry.shape}; this model "
                f"({config.num_heads} heads, {config.num_kv_heads} KV heads, head_dim {config.head_dim}) needs {want}: "
                "these are the heads of another model"
            )
    return hidden

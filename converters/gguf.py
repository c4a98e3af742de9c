"""A GGUF file into an HF folder: dequantised weights, configuration, tokenizer with chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from apb_jax.errors import UserError
from apb_jax.weights.atomic import require_space, staged_folder
from apb_jax.weights.checkpoint import HFFolder, load, parse_dtype
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.hf_folder import INDEX_FILE
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry
from apb_jax.weights.stream import Progress
from converters.convert import DISK_MARGIN, Converted

SHARD_BYTES = 4 * 10**9
"""A safetensors file takes no more than this, unless one tensor does; so much is held in memory."""


def convert_gguf(source: str, out: Path, *, dtype: str | None = None, progress: Progress | None = None) -> Converted:
    """Write ``out`` as an HF folder. Without ``dtype`` every value is kept: floats as stored, the rest in float32.

    Raises:
        UserError: no GGUF file, anything in it that is not computed, or a disk that is too small; ``out`` is untouched.
    """
    model = load(source)
    if model.folder is None or not is_gguf(model.folder) or not isinstance(model.source, HFFolder):
        raise UserError(f"{source} is no GGUF file; `python -m converters hf` takes HF folders")
    fixed = None if dtype is None else np.dtype(parse_dtype(dtype))
    entries = sorted(model.source.entries.values(), key=lambda entry: entry.offset)
    size = sum(_bytes(entry, fixed) for entry in entries)
    require_space(out, size + DISK_MARGIN)
    with staged_folder(out) as partial:
        (partial / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2), encoding="utf-8")
        generation = {"bos_token_id": model.config.bos_id, "eos_token_id": list(model.config.eos_ids) or None}
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        _write_weights(entries, fixed, partial, size, progress)
    return Converted(out, size, sum(math.prod(entry.shape) for entry in entries))


def _bytes(entry: TensorEntry, fixed: np.dtype | None) -> int:
    return math.prod(entry.shape) * (fixed or DTYPES[entry.dtype]).itemsize


def _shards(entries: list[TensorEntry], fixed: np.dtype | None) -> Iterator[list[TensorEntry]]:
    """Neighbours in the file, together at most ``SHARD_BYTES`` as written."""
    shard: list[TensorEntry] = []
    filled = 0
    for entry in entries:
        if shard and filled + _bytes(entry, fixed) > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += _bytes(entry, fixed)
    yield shard


def _write_weights(
    entries: list[TensorEntry], fixed: np.dtype | None, out: Path, size: int, progress: Progress | None
) -> None:
    shards = list(_shards(entries, fixed))
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in shard:
            whole = np.empty(entry.shape, DTYPES[entry.dtype])
            entry.read_into(whole)
            tensors[entry.name] = whole if fixed is None else whole.astype(fixed)
            done += tensors[entry.name].nbytes
            if progress:
                progress(done, size)
        save_file(tensors, out / file, metadata={"format": "pt"})  # transformers asks for it
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")

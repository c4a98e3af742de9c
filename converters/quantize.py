"""An unquantised model into an FP8 checkpoint in the published layout of compressed-tensors' FP8-dynamic."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from apb_jax.errors import UserError
from apb_jax.model.weights import QUANTISED
from apb_jax.weights.atomic import require_space, staged_folder
from apb_jax.weights.checkpoint import HFFolder, load
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.hf_folder import HEADS_FILE, INDEX_FILE, read_json
from apb_jax.weights.mapping import rules_for
from apb_jax.weights.published_fp8 import FP8_DYNAMIC, KEY
from apb_jax.weights.quantised import refusal
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry
from apb_jax.weights.stream import Progress
from converters.convert import DISK_MARGIN, Converted
from converters.side_files import copy_side_files
from pallas_kernels import device
from pallas_kernels.float8 import quantise

SHARD_BYTES = 4 * 10**9
"""What is read and written at a time."""


def quantize(source: str, out: Path, *, progress: Progress | None = None) -> Converted:
    """Write ``out``: the layers' matrices in e4m3 with a float32 scale an output, everything else as it is.

    The values are those that ``--weights-dtype fp8`` makes of the same checkpoint. Peak host memory: ``SHARD_BYTES`` as
    read and as written.

    Raises:
        UserError: no unquantised HF folder, sizes that 8-bit products do not allow, a disk that is too small; ``out``
            is then untouched.
    """
    model = load(source)
    if not isinstance(model.source, HFFolder) or model.folder is None or is_gguf(model.folder):
        raise UserError(f"{source} is no HF folder; for a GGUF file run `python -m converters gguf` first")
    if model.source.fp8:
        raise UserError(f"{source} is an FP8 checkpoint already")
    if reason := refusal(model.config, device.current()):
        raise UserError(f"{source}: {reason}")
    rules = [rule for rule in rules_for(model.config) if rule.path in QUANTISED]
    matrices = {name for rule in rules for name in rule.names(model.config.num_layers)}
    own = [entry for entry in model.source.entries.values() if entry.file.name != HEADS_FILE]
    entries = sorted(own, key=lambda entry: (str(entry.file), entry.offset))
    size = sum(_bytes(entry, entry.name in matrices) for entry in entries)
    require_space(out, size + DISK_MARGIN)
    with staged_folder(out) as partial:
        copy_side_files(model.folder, partial)
        settings = read_json(model.folder / "config.json") | {KEY: FP8_DYNAMIC}
        (partial / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        if (heads := model.folder / HEADS_FILE).is_file():
            shutil.copyfile(heads, partial / HEADS_FILE)
        _write(entries, matrices, partial, size, progress)
    return Converted(out, size, sum(math.prod(entry.shape) for entry in entries))


def _bytes(entry: TensorEntry, narrow: bool) -> int:
    return math.prod(entry.shape) + 4 * entry.shape[0] if narrow else entry.nbytes


def _shards(entries: list[TensorEntry]) -> Iterator[list[TensorEntry]]:
    shard: list[TensorEntry] = []
    filled = 0
    for entry in entries:
        if shard and filled + entry.nbytes > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += entry.nbytes
    yield shard


def _write(entries: list[TensorEntry], matrices: set[str], out: Path, size: int, progress: Progress | None) -> None:
    shards = list(_shards(entries))
    weight_map: dict[str, str] = {}
    to_fp8 = jax.jit(quantise)
    done = 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for entry in shard:
            whole = np.empty(entry.shape, DTYPES[entry.dtype])
            entry.read_into(whole)
            if entry.name in matrices:
                values, scale = to_fp8(whole)
                tensors |= {entry.name: np.asarray(values), f"{entry.name}_scale": np.asarray(scale)}
            else:
                tensors[entry.name] = whole
            done += _bytes(entry, entry.name in matrices)
            if progress:
                progress(done, size)
        save_file(tensors, out / file, metadata={"format": "pt"})  # transformers asks for it
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")

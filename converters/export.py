"""Back to an HF folder that transformers loads: the inverse of every rule, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from apb_jax.errors import UserError
from apb_jax.weights.atomic import require_space, staged_folder
from apb_jax.weights.checkpoint import OrbaxFolder, load
from apb_jax.weights.hf_folder import HEADS_FILE, INDEX_FILE
from apb_jax.weights.manifest import Manifest, hash_files, read_manifest, verify
from apb_jax.weights.mapping import RETAINING_HEADS, Rule, rules_for
from apb_jax.weights.orbax_folder import restore
from apb_jax.weights.stream import Progress
from converters.convert import DISK_MARGIN, Converted
from converters.side_files import copy_side_files

SINGLE_FILE_BYTES = 4 * 10**9
"""A larger model is written as one file per rule, with an index."""


def export(source: str, out: Path, *, progress: Progress | None = None) -> Converted:
    """Write a converted folder as an HF folder (config.json, safetensors, tokenizer, retaining heads beside them).

    Peak host memory: twice the largest stacked array, or the whole model where it fits one file.

    Raises:
        UserError: ``source`` is no converted folder, one of its files was altered, or the disk is too small.
    """
    folder = Path(source)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.kind != "orbax":
        raise UserError(f"{source} is no converted folder; `python -m converters hf` makes one")
    model = load(folder, dtype=manifest.dtype, fold_heads=False)
    assert isinstance(model.source, OrbaxFolder)  # the manifest says so
    recorded = {folder / name: record.sha256 for name, record in manifest.files.items()}
    verify(hash_files(recorded), recorded)
    size = sum(s.size * s.dtype.itemsize for s in model.shapes().values())
    require_space(out, size + DISK_MARGIN)
    rules = [r for r in rules_for(model.config, model.retaining_hidden) if r not in RETAINING_HEADS]
    with staged_folder(out) as partial:
        copy_side_files(folder, partial)
        _write_model(model, rules, partial, size, progress)
        if model.retaining_hidden:
            save_file(_heads(model), partial / HEADS_FILE)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        Manifest(
            kind="hf",
            dtype=manifest.dtype,
            retaining_hidden=manifest.retaining_hidden,
            source=manifest.source,
            revision=manifest.revision,
            source_files=manifest.files,
            mapping=manifest.mapping,
            parameters=manifest.parameters,
            files={path.name: record for path, record in hash_files(written).items()},
        ).write(partial)
    return Converted(out, size, sum(s.size for s in model.shapes().values()))


def _write_model(model: Any, rules: list[Rule], out: Path, size: int, progress: Progress | None) -> None:
    metadata = {"format": "pt"}  # transformers asks for it
    if size <= SINGLE_FILE_BYTES:
        tensors = {name: array for rule in rules for name, array in _tensors(model, rule)}
        save_file(tensors, out / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    done = 0
    for number, rule in enumerate(rules, 1):
        tensors = dict(_tensors(model, rule))
        file = f"model-{number:05d}-of-{len(rules):05d}.safetensors"
        save_file(tensors, out / file, metadata=metadata)
        weight_map |= dict.fromkeys(tensors, file)
        done += sum(tensor.nbytes for tensor in tensors.values())
        if progress:
            progress(done, size)
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    (out / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _tensors(model: Any, rule: Rule) -> Iterator[tuple[str, np.ndarray]]:
    """(HF name, array as HF stores it), from our one array."""
    array = _array(model, rule.path)
    for name, layer in zip(rule.names(model.config.num_layers), array if rule.stacked else array[None], strict=True):
        yield name, np.ascontiguousarray(layer.T if rule.transpose else layer)


def _heads(model: Any) -> dict[str, np.ndarray]:
    """The retaining heads under their original names: fc1's three parts put together again."""
    parts: dict[str, list[np.ndarray]] = {}
    for rule in RETAINING_HEADS:
        for name, array in _tensors(model, rule):
            parts.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays, axis=-1) for name, arrays in parts.items()}


def _array(model: Any, path: str) -> np.ndarray:
    shape = model.shapes()[path]
    ((_, array),) = restore(model.folder, {path: shape}, {path: _host()})
    return np.asarray(array)


def _host() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

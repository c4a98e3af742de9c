"""The conversion itself: an HF model into a folder of ours, or heads into a safetensors file; whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from apb_jax.errors import UserError
from apb_jax.weights.atomic import require_space, staged_file, staged_folder
from apb_jax.weights.checkpoint import HFFolder, LoadedModel, load
from apb_jax.weights.folding import FOLDED, fold
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.hf_folder import read_config
from apb_jax.weights.locate import locate, locate_heads
from apb_jax.weights.manifest import (
    FileRecord,
    Manifest,
    expected_hashes,
    hash_files,
    read_manifest,
    verify,
)
from apb_jax.weights.mapping import RETAINING_HEADS, rules_for, sizes_of
from apb_jax.weights.orbax_folder import save
from apb_jax.weights.retaining_heads import check_heads, read_heads
from apb_jax.weights.safetensors_header import DTYPES
from apb_jax.weights.spread import spread
from apb_jax.weights.stream import Progress
from converters.side_files import copy_side_files, side_files

DISK_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class Converted:
    """What a conversion did: ``bytes`` of weights, ``parameters`` by path."""

    folder: Path
    bytes: int
    parameters: int
    already: bool = False


def convert_model(
    source: str,
    out: Path,
    *,
    dtype: str | None = None,
    heads: str | None = None,
    sp: int = 1,
    tp: int = 1,
    fold_heads: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Read an HF model (folder or hub id), write ``out``: orbax weights, config.json, tokenizer, manifest.

    On its way every weight byte lives on one device of the mesh ``sp`` x ``tp`` if this machine has it, else on the
    first device; the output restores onto any mesh. SHA-256 of the source files are computed meanwhile and held against
    those that a manifest or the hub cache knows.

    Raises:
        UserError: anything wrong with the source, the target or the disk; ``out`` is then untouched.
    """
    located = locate(source)
    model = load(source, heads=heads, dtype=dtype or _file_dtype(source, heads))
    if not isinstance(model.source, HFFolder):
        raise UserError(f"{source} is a converted folder already; give the HF folder or hub id it came from")
    if model.source.fp8:
        raise UserError(f"{source} is an FP8 checkpoint, which loads as it is; convert the unquantised one")
    assert model.folder is not None  # an HFFolder has one
    if is_gguf(model.folder):
        raise UserError(f"{source} is a GGUF file; `python -m converters gguf` makes the HF folder to convert")
    if fold_heads and model.retaining_hidden is None:
        raise UserError(f"{source} has no retaining heads to fold; give --heads FILE")
    parameters = _parameters(model, fold_heads)
    files, mesh = model.source.files, _mesh(model, sp, tp)
    beside = side_files(model.folder)
    if out.exists() and _same(out, model, files, beside, fold_heads):
        return Converted(out, *_size(parameters), already=True)
    size, count = _size(parameters)
    require_space(out, size + DISK_MARGIN)
    with staged_folder(out) as partial, ThreadPoolExecutor(1) as background:
        hashing = background.submit(hash_files, files)
        targets = model.shardings(mesh) | (replace(model, fold_heads=True).shardings(mesh) if fold_heads else {})
        shardings = {path: spread(targets[path], shape.shape) for path, shape in parameters.items()}
        arrays = model.source.place(model, shardings, progress)
        if fold_heads:
            arrays |= fold(arrays, parameters, shardings)
        records = hashing.result()
        verify(records, expected_hashes(files))
        save(partial, arrays)
        copy_side_files(model.folder, partial)
        _write_manifest(partial, model, parameters, records, located.hub_id or located.name, located.revision)
    return Converted(out, size, count)


def _file_dtype(source: str, heads: str | None) -> str:
    """The dtype that keeps the files' values: bf16 where all are bf16, else float32; F16 is for the user to decide."""
    found = load(source, heads=heads).source
    dtypes = found.dtypes if isinstance(found, HFFolder) else {"F32"}
    if "F16" in dtypes:
        raise UserError(f"{source} holds float16 weights, which are not kept as such; choose --dtype bf16 or float32")
    return "bf16" if dtypes == {"BF16"} else "float32"


def _parameters(model: LoadedModel, fold_heads: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What the output holds: folded heads stand beside the unfolded ones, which only an export needs."""
    return model.shapes() | (replace(model, fold_heads=True).shapes() if fold_heads else {})


def _size(parameters: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, int]:
    shapes = parameters.values()
    return sum(s.size * s.dtype.itemsize for s in shapes), sum(s.size for s in shapes)


def _same(out: Path, model: LoadedModel, files: list[Path], beside: list[Path], fold_heads: bool) -> bool:
    """Whether ``out`` is this very conversion of the same bytes, finished earlier; reads all of the source."""
    manifest = read_manifest(out)
    return (
        manifest is not None
        and manifest.kind == "orbax"
        and manifest.dtype == str(model.dtype)
        and manifest.retaining_hidden == model.retaining_hidden
        and manifest.folded_heads == fold_heads
        and {name: record.bytes for name, record in manifest.source_files.items()}
        == {file.name: file.stat().st_size for file in files}
        and all((out / name).is_file() for name in manifest.files)
        and read_config(out) == model.config
        and all(manifest.files.get(file.name) == record for file, record in hash_files(beside).items())
        and manifest.source_files == {file.name: record for file, record in hash_files(files).items()}
    )


def _write_manifest(
    folder: Path,
    model: LoadedModel,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    sources: Mapping[Path, FileRecord],
    name: str,
    revision: str | None,
) -> None:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    Manifest(
        kind="orbax",
        dtype=str(model.dtype),
        retaining_hidden=model.retaining_hidden,
        folded_heads=FOLDED[0] in parameters,
        source=name,
        revision=revision,
        source_files={file.name: record for file, record in sources.items()},
        mapping=tuple(str(rule) for rule in rules_for(model.config, model.retaining_hidden)),
        parameters={path: (shape.shape, str(shape.dtype)) for path, shape in parameters.items()},
        files={path.relative_to(folder).as_posix(): record for path, record in hash_files(written).items()},
    ).write(folder)


def convert_heads(source: str, out: Path, *, model: str | None = None) -> Converted:
    """Retaining heads from a torch ``.bin`` or a (whole-model) safetensors file into ``out``, names and values kept.

    ``model``: the model they must fit; without it only their own consistency is checked.

    Raises:
        UserError: no heads in the file, anything but plain tensors in it, heads of another model.
    """
    file = locate_heads(source)
    heads = read_heads(file)
    if model is not None:
        config = load(model, weights="random").config
        hidden = check_heads(heads, config)
        sizes = sizes_of(config, hidden)
        for rule in RETAINING_HEADS:
            for name in rule.names(config.num_layers):
                if name not in heads:
                    raise UserError(f"{file} lacks {name!r} of shape {rule.hf_shape(sizes)}; it is incomplete")
    verify(hash_files([file]), expected_hashes([file]))
    size = sum(entry.nbytes for entry in heads.values())
    require_space(out, size)
    tensors = {}
    for name, entry in heads.items():
        tensors[name] = np.empty(entry.shape, DTYPES[entry.dtype])
        entry.read_into(tensors[name])
    with staged_file(out) as partial:
        save_file(tensors, partial)
    return Converted(out, size, sum(tensor.size for tensor in tensors.values()))


def _mesh(model: LoadedModel, sp: int, tp: int) -> Mesh | None:
    """The mesh whose devices share the arrays meanwhile; None (the first device) where this machine is too small."""
    for name, value in (("sp", sp), ("tp", tp)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    model.check_tp(tp)
    devices = jax.devices()
    if sp * tp == 1 or sp * tp > len(devices):
        return None
    return Mesh(np.asarray(devices[: sp * tp]).reshape(sp, tp), ("sp", "tp"))

"""Our converted format: an orbax checkpoint (OCDBT) in ``weights/``, chunked so that any mesh reads its part alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.weights.folding import FOLDED
from apb_jax.weights.manifest import Manifest
from apb_jax.weights.mapping import MissingTensor, UnexpectedTensor, WrongShape, rules_for, sizes_of
from apb_jax.weights.spread import spread
from apb_jax.weights.stream import Progress

WEIGHTS = "weights"
CHUNK_BYTES = 64 * 2**20
FILE_BYTES = 2**30
GROUP_BYTES = 4 * 2**30
"""Arrays restored by one call: bounds host memory (a single larger array goes alone)."""


def save(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays by path into ``folder/weights``, uncompressed: bf16 weights hardly compress, and it costs load time.

    Peak host memory beyond the arrays: about the largest one.
    """
    largest = max(array.nbytes for array in arrays.values())
    limit = math.ceil(largest / 1e9) + 1
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=limit, save_device_host_concurrent_gb=limit, use_compression=False
    )
    args = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in arrays}
    target = (folder / WEIGHTS).absolute()
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(
                target,
                args=ocp.args.PyTreeSave(nest(arrays), save_args=nest(args), ocdbt_target_data_file_size=FILE_BYTES),
            )
        except (ValueError, OSError):
            _report_once(target)
            raise


def _report_once(target: Path) -> None:
    """Orbax awaits one of its concurrent writes only; asyncio would log the others that failed for the same reason."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, ValueError | OSError) and str(target) in str(error))

    logging.getLogger("asyncio").addFilter(is_news)


def restore(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Sharding],
    progress: Progress | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield (path, array) in its sharding, whatever mesh it was saved from; each byte is read by one device only."""
    total = sum(_nbytes(shape) for shape in shapes.values())
    done = 0
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        for group in _groups(shapes):
            wanted = {
                path: jax.ShapeDtypeStruct(
                    shapes[path].shape, shapes[path].dtype, sharding=spread(shardings[path], shapes[path].shape)
                )
                for path in group
            }
            tree = nest(wanted)
            args = ocp.checkpoint_utils.construct_restore_args(tree)
            try:
                restored = checkpointer.restore(
                    (folder / WEIGHTS).absolute(),
                    args=ocp.args.PyTreeRestore(tree, restore_args=args, partial_restore=True),
                )
            except (ValueError, FileNotFoundError, KeyError) as error:
                line = " ".join(str(error).split())[:300]
                raise UserError(f"{folder / WEIGHTS} does not restore: {line}; convert the model again") from error
            for path, array in unnest(restored).items():
                yield path, jax.device_put(array, shardings[path])
            done += sum(_nbytes(shapes[path]) for path in group)
            if progress:
                progress(done, total)


def check_parameters(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """What the manifest says the folder holds against what ``config.json`` demands."""
    sizes = sizes_of(config, manifest.retaining_hidden)
    rules = {rule.path: rule for rule in rules_for(config, manifest.retaining_hidden)}
    if missing := sorted(rules.keys() - manifest.parameters.keys()):
        raise MissingTensor(f"{folder} holds no {missing[0]!r}, which its config.json demands; convert the model again")
    for path, (shape, _) in manifest.parameters.items():
        if path in FOLDED and manifest.folded_heads:
            continue  # made here, from rules that are checked themselves
        if path not in rules:
            raise UnexpectedTensor(f"{folder} holds {path!r}, which its config.json does not have")
        if shape != rules[path].our_shape(sizes, config.num_layers):
            raise WrongShape(
                f"{folder}: {path!r} has shape {shape}; its config.json demands "
                f"{rules[path].our_shape(sizes, config.num_layers)}; rule: {rules[path]}"
            )


def _nbytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * shape.dtype.itemsize


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for path, shape in shapes.items():
        if group and size + _nbytes(shape) > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += _nbytes(shape)
    yield group


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers.q": x} -> {"layers": {"q": x}}."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, last = path.split(".")
        node = out
        for name in folders:
            node = node.setdefault(name, {})
        node[last] = leaf
    return out


def unnest(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of ``nest``."""
    out: dict[str, Any] = {}
    for name, leaf in tree.items():
        out |= unnest(leaf, f"{prefix}{name}.") if isinstance(leaf, Mapping) else {f"{prefix}{name}": leaf}
    return out

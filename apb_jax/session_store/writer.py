"""Saving a session: K and V in document order without padding, a group of layers a file, whole or absent."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from safetensors.numpy import save as as_safetensors

from apb_jax import __version__
from apb_jax.errors import UserError
from apb_jax.host_kv import HostCache
from apb_jax.quantised_cache import AnyCache
from apb_jax.session_store.identity import identity, saved_method
from apb_jax.session_store.manifest import FORMAT, PROMPTS, FileFacts, Manifest, kv_file
from apb_jax.session_store.rows import rows_in_order
from apb_jax.weights.atomic import PARTIAL, require_space, staged_folder

if TYPE_CHECKING:
    from apb_jax.session import Session

GROUP_BYTES = 1 << 28
"""Layers that go into a file together take so many bytes over all requests; at least one layer."""


def save(session: Session, folder: str | Path, beside: Mapping[str, bytes] | None = None) -> Manifest:
    """Write a session to a new folder; killed or out of space, it leaves nothing that loads.

    The cache passes through the host a group of layers at a time; one is written while the next one leaves the devices.

    Args:
        beside: further files by name, hashed and kept with the session; ``read_beside`` reads them.

    Raises:
        UserError: the folder exists or cannot be written, the disk is too small, or devices belong to other processes.
    """
    folder = Path(folder)
    if folder.name.endswith(PARTIAL):
        raise UserError(f"{folder} ends in {PARTIAL}, the mark of unfinished output; choose another name")
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder for the session, or remove it first")
    cache, engine = session.cache, session.engine
    if not cache.addressable:
        raise UserError(f"a session over {jax.process_count()} processes cannot be saved; run it in one process")
    rows = rows_in_order(session.layout, session.lengths.placement)
    kept = [len(at) for at, _ in rows]
    layers = cache.layers
    layer_bytes = sum(kept) * cache.row_bytes
    group = max(1, min(layers, GROUP_BYTES // max(1, layer_bytes)))
    require_space(folder, layers * layer_bytes)
    facts = identity(engine) | {"weights": engine.fingerprint}
    files: dict[str, FileFacts] = {}
    with staged_folder(folder) as partial, ThreadPoolExecutor(1) as behind:

        def write(name: str, tensors: dict[str, np.ndarray]) -> None:
            data = as_safetensors(tensors)
            files[name] = FileFacts.of(data)
            (partial / name).write_bytes(data)

        for name, data in (beside or {}).items():
            files[name] = FileFacts.of(data)
            (partial / name).write_bytes(data)
        write(PROMPTS, _prompts(session, [positions for _, positions in rows]))
        written = None
        for first in range(0, layers, group):
            for request, tensors in enumerate(_group(cache, [at for at, _ in rows], first, min(group, layers - first))):
                if written is not None:
                    written.result()
                written = behind.submit(write, kv_file(request, first), tensors)
        if written is not None:
            written.result()
        manifest = Manifest(
            format=FORMAT,
            saved=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={"apb_jax": __version__} | {name: version(name) for name in ("jax", "flax")},
            model=engine.model.name,
            identity=facts,
            method=saved_method(session),
            layers=layers,
            group=group,
            kept_tokens=kept,
            document_tokens=[len(prompt.document) for prompt in session.prompts],
            tail_position=session.layout.tail_position.tolist(),
            prefill_s=session.prefill_s,
            notes=list(session.notes),
            files=files,
        )
        manifest.write(partial)
    return manifest


def _prompts(session: Session, positions: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Ids of every request, and the positions of its kept rows."""
    tensors: dict[str, np.ndarray] = {}
    for b, (prompt, at) in enumerate(zip(session.prompts, positions, strict=True)):
        tensors |= {f"{b}.{name}": ids.astype(np.int32) for name, ids in vars(prompt).items()}
        tensors[f"{b}.positions"] = at
    return tensors


def _group(cache: AnyCache | HostCache, rows: list[np.ndarray], first: int, count: int) -> list[dict[str, np.ndarray]]:
    """For every request its K and V, [kept, K, D] a layer, of ``count`` layers; of 8-bit codes the scales too."""
    out: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for layer in range(first, first + count):
        for name, whole in cache.on_host(layer).items():
            for b, at in enumerate(rows):
                out[b][f"{layer}.{name}"] = _taken(whole[b], at)
    return out


def _taken(whole: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The rows ``at`` of ``whole``, which are not copied where they follow each other."""
    if len(at) and at[-1] - at[0] + 1 == len(at) and (np.diff(at) == 1).all():
        return whole[at[0] : at[-1] + 1]
    return whole[at]

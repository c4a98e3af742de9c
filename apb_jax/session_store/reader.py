"""Loading a session: every file against its hash, rows laid out for the shards of the engine that asks."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.registry import METHODS
from apb_jax.decode import DecodePlan
from apb_jax.errors import UserError
from apb_jax.host_kv import HostCache
from apb_jax.kv_codes import CODES
from apb_jax.kv_memory import DEVICE
from apb_jax.prefill import layer_groups
from apb_jax.programs import Lengths, Programs
from apb_jax.prompt.ids import as_ids
from apb_jax.quantised_cache import AnyCache, cache_kind
from apb_jax.session import Session
from apb_jax.session_store.folders import touch
from apb_jax.session_store.identity import check_engine
from apb_jax.session_store.manifest import PROMPTS, FileFacts, Manifest, kv_file, read_manifest
from apb_jax.session_store.rows import even_layout, rows_in_order
from apb_jax.typed import check_value
from apb_jax.weights.safetensors_header import DTYPES, read_header

if TYPE_CHECKING:
    from apb_jax.engine import Engine


def load(engine: Engine, folder: str | Path, documents: Sequence[np.ndarray] | None = None) -> Session:
    """The session saved in ``folder``, on this engine's devices, whatever number of shards it was saved on.

    A method with the common rule of decoding answers alike however the kept rows are divided; one with its own needs
    the number of shards that it was prefilled with.

    Args:
        documents: ids int32 of every document, to be compared with the saved ones.

    Raises:
        UserError: no session, a damaged one, or one that another model, method or document made; in one line.
    """
    check_value("folder", folder, str, Path)
    check_value("documents", documents, list, tuple, type(None))
    steps = load_steps(engine, folder, documents)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            session: Session = finished.value
            return session


def load_steps(
    engine: Engine, folder: str | Path, documents: Sequence[np.ndarray] | None = None
) -> Generator[tuple[int, int], None, Session]:
    """``load`` cut between groups of layers, as ``Engine.prefill_steps`` is: yields (layers done, of how many).

    Close the generator to cancel.
    """
    folder, started = Path(folder), time.perf_counter()
    manifest = read_manifest(folder)
    check_engine(engine, manifest, folder)
    saved = method_of(manifest)
    prompts, positions = _read_prompts(folder, manifest)
    if documents is not None:
        check_documents(folder, prompts, documents)
    tail = np.asarray(manifest.tail_position, np.int32)
    layout = _layout(engine, folder, manifest, saved, (prompts, positions, tail))
    asked = np.asarray([len(prompt.query) for prompt in prompts], np.int32)
    rows = [at for at, _ in rows_in_order(layout, engine.placement)]
    target = Target(engine.programs, rows, layout.shards * layout.kept_capacity)
    cache: AnyCache | HostCache = HostCache(stay=engine.settings.kv_layers)
    if engine.settings.kv_memory == DEVICE:
        cache = engine.programs.document_cache(len(prompts), target.rows, engine.model.dtype)
    kind = cache_kind(engine.settings.precision.kv)
    for layer, arrays in _layers(folder, manifest, target, tuple(vars(kind.specs()))):
        cache = target.put(cache, layer, arrays)
        engine.progress("load session", layer + 1, manifest.layers)
        if (layer + 1) % (manifest.layers // layer_groups(manifest.layers)) == 0:
            jax.block_until_ready(cache)
            yield layer + 1, manifest.layers
    touch(folder)
    seconds = time.perf_counter() - started
    note = f"loaded from {folder} in {seconds:.2f} s, prefilled earlier on {manifest.method.shards} shards"
    return Session(
        engine=engine,
        method=saved,
        layout=layout,
        prompts=prompts,
        lengths=engine.programs.place(Lengths.of(layout, asked, engine.placement)),
        cache=cache,
        prefill_s=manifest.prefill_s,
        compile_s=0.0,
        notes=(*manifest.notes, note),
    )


def method_of(manifest: Manifest) -> AttentionMethod:
    """The method that prefilled a session, with its hyper-parameters."""
    return METHODS[manifest.method.name](**manifest.method.fields)


def check_documents(folder: object, prompts: Sequence[Prompt], documents: Sequence[np.ndarray]) -> None:
    """Refuse other documents than the saved ones, naming the first difference."""
    if len(prompts) != len(documents):
        raise UserError(f"{folder} holds {len(prompts)} documents, here are {len(documents)}")
    for b, (prompt, given) in enumerate(zip(prompts, documents, strict=True)):
        saved, ours = prompt.document, as_ids(given, f"document {b}")
        if len(saved) != len(ours):
            raise UserError(f"document {b} of {folder} has {len(saved)} tokens, the one given has {len(ours)}")
        differ = np.flatnonzero(saved != ours)
        if len(differ):
            at = int(differ[0])
            raise UserError(f"document {b} of {folder} has token {saved[at]} at index {at}, the one given {ours[at]}")


@dataclass(frozen=True)
class Target:
    """Where saved rows go: row j of request b stands in row ``order[b][j]`` of ``rows`` cache rows."""

    programs: Programs
    order: list[np.ndarray]
    rows: int

    def put(self, cache: AnyCache | HostCache, layer: int, arrays: dict[str, np.ndarray]) -> AnyCache | HostCache:
        """The cache with one layer from the host, by field of the cache; the old one is donated."""
        place = self.programs.place
        if isinstance(cache, HostCache):
            kind = cache_kind(self.programs.precision.kv)
            whole = kind(**{name: place(array[None], getattr(kind.specs(), name)) for name, array in arrays.items()})
            return cache.grown(self.programs.mesh, whole)
        specs = cache.specs()
        parts = {name: P(*getattr(specs, name)[1:]) for name in arrays}
        make = lambda: self.programs.traced(  # noqa: E731
            lambda cache, layer, arrays: cache.replaced(layer, **arrays), (specs, P(), parts), specs, donate=(0,)
        )
        placed = {name: place(array, parts[name]) for name, array in arrays.items()}
        loaded: AnyCache = self.programs.call("load", None, make, (cache, place(np.int32(layer)), placed))
        return loaded


def _layout(
    engine: Engine,
    folder: Path,
    manifest: Manifest,
    method: AttentionMethod,
    kept: tuple[list[Prompt], list[np.ndarray], np.ndarray],
) -> Layout:
    """The method's own layout on as many shards as it was prefilled with, else an even division of what it kept."""
    prompts, positions, tail = kept
    shards, before = engine.placement.shards, manifest.method.shards
    if shards == before:
        layout = method.layout(prompts, shards)
        found = [at for _, at in rows_in_order(layout, engine.placement)]
        if all(np.array_equal(a, b) for a, b in zip(found, positions, strict=True)):
            return layout
        raise UserError(f"{folder} keeps other rows than {method.name} keeps in this version; prefill it again")
    own = DecodePlan.of(method).method is not None
    if own or engine.settings.bottom_right_query:
        why = f"method {method.name!r} decodes by its own rule" if own else "the causal quirk of the query phase is on"
        raise UserError(
            f"{folder} was saved on {before} shards, here are {shards}, and {why}: nearest legal choice: {before} "
            "shards (--sp, --shards)"
        )
    return even_layout(prompts, positions, tail, shards)


def _read_prompts(folder: Path, manifest: Manifest) -> tuple[list[Prompt], list[np.ndarray]]:
    tensors = read_checked(folder / PROMPTS, manifest.files[PROMPTS])
    prompts = [
        Prompt(**{name: tensors[f"{b}.{name}"] for name in ("document", "query", "embedded_query")})
        for b in range(len(manifest.document_tokens))
    ]
    return prompts, [tensors[f"{b}.positions"] for b in range(len(prompts))]


def _layers(
    folder: Path, manifest: Manifest, target: Target, names: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(layer, arrays [B, rows, K, ...] of the cache by field) as the engine lays them out; the next files are read
    meanwhile."""

    def read(first: int) -> list[dict[str, np.ndarray]]:
        files = [kv_file(request, first) for request in range(len(target.order))]
        return [read_checked(folder / file, manifest.files[file]) for file in files]

    firsts = range(0, manifest.layers, manifest.group)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, firsts[0])
        for first in firsts:
            group = ahead.result()
            if first + manifest.group < manifest.layers:
                ahead = reader.submit(read, first + manifest.group)
            for layer in range(first, min(first + manifest.group, manifest.layers)):
                yield layer, {name: _laid_out([one[f"{layer}.{name}"] for one in group], target) for name in names}


def _laid_out(requests: list[np.ndarray], target: Target) -> np.ndarray:
    # A new array every time: on a CPU the devices may read from it without a copy.
    whole = np.zeros((len(requests), target.rows, *requests[0].shape[1:]), requests[0].dtype)
    for b, (rows, at) in enumerate(zip(requests, target.order, strict=True)):
        whole[b, at] = rows
    return whole


def read_beside(folder: Path, manifest: Manifest, name: str) -> bytes | None:
    """A file that was kept with a session, against its hash; None where it has none of this name.

    Raises:
        UserError: it is damaged or gone.
    """
    if name not in manifest.files:
        return None
    return checked_bytes(folder / name, manifest.files[name]).tobytes()


def read_documents(folder: Path, manifest: Manifest) -> list[np.ndarray]:
    """The ids int32 of a session's documents, against their hash; no KV is read. UserError where damaged."""
    return [prompt.document for prompt in _read_prompts(folder, manifest)[0]]


def read_checked(path: Path, facts: FileFacts) -> dict[str, np.ndarray]:
    """The tensors of a file whose bytes are those that were saved; UserError else."""
    data = checked_bytes(path, facts)
    codes = {"F8_E4M3": CODES["fp8"].dtype, "I8": CODES["int8"].dtype}
    kinds: dict[str, Any] = {**DTYPES, **codes, "I32": np.dtype(np.int32)}
    return {
        entry.name: data[entry.offset : entry.offset + entry.nbytes].view(kinds[entry.dtype]).reshape(entry.shape)
        for entry in read_header(path)
    }


def checked_bytes(path: Path, facts: FileFacts) -> np.ndarray:
    """The bytes of a file that was saved; UserError where they are others."""
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone: the session was removed while it was being loaded") from error
    found = FileFacts.of(data)
    if found != facts:
        raise UserError(
            f"{path} is damaged: its XXH3 is {found.xxh3}, the manifest says {facts.xxh3}; remove the session"
        )
    return data

"""``manifest.json`` of a saved session: what it was made by, what is in its files, and a checksum of itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from apb_jax.errors import UserError
from apb_jax.files import read_json, what_is
from apb_jax.weights.atomic import PARTIAL
from apb_jax.weights.fingerprint import text_fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.safetensors"


@dataclass(frozen=True)
class FileFacts:
    """Size and XXH3-128 of a file: finds what a disk or a copy did to it, not what an enemy did."""

    bytes: int
    xxh3: str

    @classmethod
    def of(cls, data: Any) -> FileFacts:
        """Those of a file with these bytes (``bytes``, or an array of bytes)."""
        return cls(len(data), xxhash.xxh3_128_hexdigest(data))


@dataclass(frozen=True)
class SavedMethod:
    """The method as it was asked for and as it ran."""

    asked: str
    options: dict[str, Any]
    """Options given."""
    name: str
    """"full" where the documents did not fit the method that was asked for."""
    fields: dict[str, Any]
    """Every hyper-parameter of the method that ran."""
    shards: int
    """Parts of the document in prefill."""


@dataclass(frozen=True)
class Manifest:
    """Everything about a session but its tensors; plain JSON values."""

    format: int
    saved: str
    """Time of saving, ISO 8601, UTC."""
    versions: dict[str, str]
    """Of this package and of JAX; told, not compared."""
    model: str
    identity: dict[str, Any]
    """What an engine must be like to answer from this session: see ``identity.py``."""
    method: SavedMethod
    layers: int
    group: int
    """Layers in a file of KV; the last file may hold fewer."""
    kept_tokens: list[int]
    """Rows of KV of every request."""
    document_tokens: list[int]
    tail_position: list[int]
    """Position of the first query token of every request."""
    prefill_s: float
    notes: list[str]
    files: dict[str, FileFacts]

    @property
    def bytes(self) -> int:
        """Bytes of all files but this one."""
        return sum(one.bytes for one in self.files.values())

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` with its checksum."""
        body = asdict(self)
        text = json.dumps(body | {"checksum": text_fingerprint(body)}, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def kv_file(request: int, first: int) -> str:
    """The file of one request's KV from layer ``first`` on."""
    return f"kv-request{request:04d}-layer{first:04d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a saved session, checked against itself and the sizes of its files; no tensor is read.

    Raises:
        UserError: no session, an unfinished or damaged one, or one of another format; in one line.
    """
    folder = Path(folder)
    if folder.name.endswith(PARTIAL):
        raise UserError(f"{folder} is unfinished: its saving was cut off; remove it and save again")
    path = folder / MANIFEST
    if what_is(path) is None:
        raise UserError(f"{folder} is no saved session (it has no {MANIFEST})")
    try:
        body = read_json(path, "a session's manifest")
    except UserError as error:
        if not isinstance(error.__cause__, ValueError | RecursionError):
            raise
        raise UserError(f"{path} is damaged: it is no JSON ({error.__cause__}); remove the session") from error
    if not isinstance(body, dict) or "checksum" not in body:
        raise UserError(f"{folder}/{MANIFEST} is no session's manifest: it has no checksum")
    if body.get("format") != FORMAT:
        raise UserError(f"{folder} has format {body.get('format')!r}, this version reads {FORMAT}; prefill it again")
    stored = body.pop("checksum")
    found = text_fingerprint(body)
    if stored != found:
        raise UserError(f"{folder}/{MANIFEST} is damaged: its checksum is {found}, it says {stored}")
    manifest = _manifest(body, folder)
    for name, facts in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts.bytes:
            has = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{path} is damaged: it {has}, the manifest says {facts.bytes}; remove the session")
    return manifest


def _manifest(body: dict[str, Any], folder: Path) -> Manifest:
    names = {field.name for field in fields(Manifest)}
    if set(body) != names:
        raise UserError(f"{folder}/{MANIFEST} is no session's manifest: its keys differ by {sorted(set(body) ^ names)}")
    files = {name: FileFacts(**facts) for name, facts in body["files"].items()}
    return Manifest(**{**body, "method": SavedMethod(**body["method"]), "files": files})

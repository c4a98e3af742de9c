"""The manifest of a checkpoint folder: what it was made from, by which versions, and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json

MANIFEST_FILE = "apb_jax_manifest.json"
FORMAT = "apb_jax checkpoint 1"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``kind`` is "orbax" or "hf"; ``files`` are those of the folder itself, ``source_files`` those it was made from.

    ``parameters``: our path -> (shape, dtype) of what the folder holds; ``mapping``: the rules that were applied.
    """

    kind: str
    dtype: str
    retaining_hidden: int | None
    source: str
    revision: str | None
    source_files: Mapping[str, FileRecord]
    mapping: tuple[str, ...]
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    files: Mapping[str, FileRecord]
    folded_heads: bool = False
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def write(self, folder: Path) -> None:
        """Write the manifest; the last thing that goes into a folder."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    names = ("apb-jax", "jax", "flax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise UserError(f"{file} is of a format that this version does not read; it reads {FORMAT!r}")
        for name in ("files", "source_files"):
            content[name] = {path: FileRecord(**record) for path, record in content[name].items()}
        content["parameters"] = {
            path: (tuple(shape), str(dtype)) for path, (shape, dtype) in content["parameters"].items()
        }
        return Manifest(**(content | {"mapping": tuple(content["mapping"])}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged: {error}; convert the model again") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there and has its size (cheap: done with every load)."""
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; the manifest lists it: copy the folder or convert the model again")
        if (size := file.stat().st_size) != record.bytes:
            raise UserError(
                f"{file} has {size} bytes, the manifest says {record.bytes}: copy the folder or convert the model again"
            )


def hash_files(files: Iterable[Path]) -> dict[Path, FileRecord]:
    """Size and SHA-256 of each file, four at a time."""
    ordered = list(files)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ordered, pool.map(_record, ordered), strict=True))


def _record(file: Path) -> FileRecord:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(file.stat().st_size, digest)


def verify(records: Mapping[Path, FileRecord], expected: Mapping[Path, str]) -> None:
    """Refuse the first file whose SHA-256 is not the expected one."""
    for file, digest in expected.items():
        if file in records and records[file].sha256 != digest:
            raise UserError(
                f"{file} has SHA-256 {records[file].sha256[:16]}..., expected {digest[:16]}...: a byte differs; "
                "copy or download it again"
            )


def expected_hashes(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 known beforehand: from a manifest beside a file, or from the hub cache, whose blobs are named by it."""
    out: dict[Path, str] = {}
    manifests: dict[Path, Manifest | None] = {}
    for file in files:
        folder = file.parent
        if folder not in manifests:
            manifests[folder] = read_manifest(folder)
        manifest = manifests[folder]
        blob = file.resolve().name
        if manifest is not None and file.name in manifest.files:
            out[file] = manifest.files[file.name].sha256
        elif file.is_symlink() and _SHA256.fullmatch(blob):
            out[file] = blob
    return out

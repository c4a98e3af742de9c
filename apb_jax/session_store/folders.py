"""Folders of saved sessions: which there are, removing one, keeping the most recently used ones."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from apb_jax.errors import UserError
from apb_jax.session_store.manifest import MANIFEST, Manifest, read_manifest
from apb_jax.weights.atomic import PARTIAL, sync, unfinished


@dataclass(frozen=True)
class Kept:
    """A saved session in a folder; ``problem``: why it does not load, in place of a manifest."""

    folder: Path
    manifest: Manifest | None
    problem: str | None
    bytes: int
    used: float
    """Seconds since the epoch at which it was saved or last loaded."""


def kept(root: str | Path) -> list[Kept]:
    """The sessions directly below ``root``, the one used longest ago first; damaged ones with what is wrong."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the folder that holds the saved sessions")
    found = []
    for folder in sorted(root.iterdir()):
        if folder.name.endswith(PARTIAL) or not (folder / MANIFEST).is_file():
            continue
        size = sum(path.stat().st_size for path in folder.iterdir())
        used = (folder / MANIFEST).stat().st_mtime
        try:
            found.append(Kept(folder, read_manifest(folder), None, size, used))
        except UserError as error:
            found.append(Kept(folder, None, str(error), size, used))
    return sorted(found, key=lambda one: one.used)


def touch(folder: Path) -> None:
    """Mark a session as used now, for the order of ``prune``; one that may not be written cannot be pruned either."""
    if os.access(folder / MANIFEST, os.W_OK):
        os.utime(folder / MANIFEST)


def remove(folder: str | Path) -> None:
    """Remove a session: killed meanwhile, it leaves nothing that loads."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no saved session (it has no {MANIFEST})")
    gone = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)  # of a removal that was cut off
    folder.rename(gone)
    sync(folder.parent)
    shutil.rmtree(gone)


def prune(root: str | Path, keep_bytes: int) -> list[Kept]:
    """Remove sessions, the one used longest ago first, until at most ``keep_bytes`` are left; returns the removed.

    Unfinished output that no process is writing goes too.
    """
    if keep_bytes < 0:
        raise UserError(f"keep_bytes is {keep_bytes}; it must be 0 or more")
    sessions, removed = kept(root), []
    for folder in sorted(Path(root).glob(f"*{PARTIAL}")):
        if unfinished(folder):
            shutil.rmtree(folder)
    total = sum(one.bytes for one in sessions)
    for one in sessions:
        if total <= keep_bytes:
            break
        remove(one.folder)
        total -= one.bytes
        removed.append(one)
    return removed

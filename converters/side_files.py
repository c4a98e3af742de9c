"""What travels beside the weights: configuration, generation settings, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from apb_jax.errors import UserError
from apb_jax.weights.hf_folder import INDEX_FILE
from apb_jax.weights.manifest import MANIFEST_FILE

PATTERNS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")


def side_files(folder: Path) -> list[Path]:
    """The side files of a checkpoint folder, by name.

    Raises:
        UserError: one is a link to a file that is not the checkpoint's: a copy would carry foreign content along.
    """
    found = sorted({file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()})
    found = [file for file in found if file.name not in (INDEX_FILE, MANIFEST_FILE)]
    for file in found:
        if not any(file.resolve().is_relative_to(home) for home in _homes(folder)):
            raise UserError(f"{file} is a link to {file.resolve()}, outside of the folder; put the file itself there")
    return found


def copy_side_files(source: Path, target: Path) -> None:
    """The content of every side file, under its name."""
    for file in side_files(source):
        shutil.copyfile(file, target / file.name)


def _homes(folder: Path) -> tuple[Path, ...]:
    """Where content of a checkpoint lies: its folder and, in the hub's cache (snapshots/REVISION), its blobs."""
    own = folder.resolve()
    return (own, own.parent.parent / "blobs") if own.parent.name == "snapshots" else (own,)

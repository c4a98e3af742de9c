"""An HF model folder: its configuration and where its tensors lie (config.json, safetensors files, an index)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json
from apb_jax.model.config import ModelConfig
from apb_jax.weights.mapping import RECOMPUTED, collect
from apb_jax.weights.published_fp8 import KEY, is_fp8
from apb_jax.weights.safetensors_header import TensorEntry, read_header

HEADS_FILE = "retaining_heads.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(file: Path) -> Any:
    """The content of a JSON file; a missing or damaged one is a clear error."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; a model folder in HF format has one") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration from ``config.json``."""
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'config.json'} holds a {type(settings).__name__}, not an object")
    kept = {name: value for name, value in settings.items() if name != KEY} if is_fp8(settings) else settings
    return ModelConfig.from_hf(kept)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of the model itself: those the index names, ``model.safetensors``, or all there are."""
    index = folder / INDEX_FILE
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{index} names {len(names)} files; missing: {', '.join(absent)}. Copy or download them again"
            )
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    files = tuple(sorted(f for f in folder.glob("*.safetensors") if f.name != HEADS_FILE))
    if not files:
        others = sorted(f.name for f in folder.glob("*.bin"))
        raise UserError(
            f"{folder} holds no *.safetensors weights"
            + (f" (only {', '.join(others)}; save the model as safetensors first)" if others else "")
        )
    return files


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model by name, headers only; the index, where there is one, must agree with the files."""
    files = weight_files(folder)
    entries = collect(entry for file in files for entry in read_header(file))
    if (index := folder / INDEX_FILE).exists():
        for name, file in _weight_map(index).items():
            if name not in entries or entries[name].file.name != file:
                raise UserError(f"{index} says that {file} holds tensor {name!r}; it does not")
    return {name: entry for name, entry in entries.items() if not RECOMPUTED.fullmatch(name)}


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map (tensor name -> file name)")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}; files of a checkpoint lie in its folder itself")
    return weight_map

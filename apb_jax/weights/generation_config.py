"""``generation_config.json``: the ids that end an answer, which often are more than ``config.json`` names."""

from __future__ import annotations

from pathlib import Path

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json

FILE = "generation_config.json"


def read_stop_ids(folder: Path) -> tuple[int, ...]:
    """``eos_token_id`` of the folder's generation_config.json, a number or a list; nothing where it says nothing."""
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    given = settings.get("eos_token_id") if isinstance(settings, dict) else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
            raise UserError(f"{path} has eos_token_id {given!r}; it must be a token id or a list of token ids")
    return tuple(ids)

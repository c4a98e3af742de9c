"""JSON from outside: text that nests too deeply is damaged text, not a crash."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """``json.loads``; what the parser cannot descend into raises ``json.JSONDecodeError`` as other damage does."""
    try:
        return json.loads(text)
    except RecursionError as error:
        shown = text if isinstance(text, str) else text.decode("utf-8", "replace")
        raise json.JSONDecodeError("nested too deeply", shown, 0) from error

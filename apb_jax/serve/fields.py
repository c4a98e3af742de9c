"""Reading a JSON body field by field: the value as a type within bounds, or a refusal that names field and rule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from apb_jax.serve.refusal import Refusal, wrong


def parse_json(raw: bytes) -> Fields:
    """A JSON object; NaN, broken UTF-8, too deep nesting and anything but an object are refused."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw, parse_constant=constant)
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # of JSON and of UTF-8
        place = f"at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else "anywhere"
        raise Refusal(400, f"the body is not valid JSON {place}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return Fields(value)


def clean_text(value: str, name: str) -> str:
    """Text that can be encoded; half surrogate pairs are no characters."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise wrong(name, f"{name} holds half of a surrogate pair at character {error.start}") from None
    return value


@dataclass(frozen=True)
class Fields:
    """An object of a request. ``null`` is as good as absent, as in OpenAI's API."""

    body: dict[str, Any]

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.body.get(name) is not None

    def flag(self, name: str) -> bool:
        """true or false; absent is false."""
        value = self.body.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise wrong(name, f"{name} must be true or false")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds, both included."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"{name} must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, *, open_low: bool = False) -> float | None:
        """A number within bounds; ``open_low``: the lower one excluded."""
        value = self.body.get(name)
        if value is None:
            return None
        rule = f"{name} must be a number {'above' if open_low else 'from'} {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise wrong(name, rule)
        if not math.isfinite(value) or (open_low and value == low):
            raise wrong(name, rule)
        return float(value)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise wrong(name, f"{name} must be a string")
        return clean_text(value, name)

    def needed_text(self, name: str) -> str:
        """A string of more than whitespace."""
        value = self.text(name)
        if value is None or not value.strip():
            raise wrong(name, f"{name} is missing or empty; it needs at least one word")
        return value

    def inner(self, name: str) -> Fields:
        """An object inside this one; absent is empty."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong(name, f"{name} must be an object")
        return Fields(value or {})

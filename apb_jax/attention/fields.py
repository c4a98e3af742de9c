"""A method's hyper-parameters are the fields of its class: which there are, and what their values may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from apb_jax.errors import UserError
from apb_jax.typed import WORDS, check_names, check_value, short, types_of

LARGEST = 2**31


def field_types(kind: type) -> dict[str, tuple[type, ...]]:
    """The fields of a method's class in order, each with the types that it takes: words that a user may type."""
    found = types_of(kind)
    for field in dataclasses.fields(kind):
        if field.name not in found or not set(found[field.name]) <= set(WORDS):
            legal = ", ".join(one.__name__ for one in WORDS)
            raise TypeError(f"{kind.__name__}.{field.name} is of type {field.type}; legal are {legal} and their unions")
    return found


def check_fields(kind: type, values: Mapping[str, Any]) -> None:
    """UserError for a value whose name is no field of the method's class, whose type is not the field's, or that no
    32-bit position reaches.
    """
    known = field_types(kind)
    check_names(f"method {kind.name!r}", values, known)  # type: ignore[attr-defined]
    for name, value in values.items():
        check_value(name, value, *known[name])
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise UserError(f"{name} is {short(value)}; it must be below {LARGEST}, for positions have 32 bits")

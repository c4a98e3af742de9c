"""A method's hyper-parameters are the fields of its class: which there are, and what their values may be."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from apb_jax.errors import UserError

WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a word", types.NoneType: "none",
}  # fmt: skip
"""Types that a field may have, alone or in a union, and what a user is told of them."""


@functools.cache
def field_types(kind: type) -> dict[str, tuple[type, ...]]:
    """The fields of a method's class in order, each with the types that it takes."""
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        found[field.name] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not set(found[field.name]) <= set(WORDS):
            legal = ", ".join(one.__name__ for one in WORDS)
            raise TypeError(f"{kind.__name__}.{field.name} is of type {hint}; legal are {legal} and unions of them")
    return found


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a field's type: whole numbers are numbers too, true and false are not."""
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def check_fields(kind: type, values: Mapping[str, Any]) -> None:
    """UserError for a value whose name is no field of the method's class, or whose type is not the field's."""
    known = field_types(kind)
    for name, value in values.items():
        if name not in known:
            takes = ", ".join(known) or "no options"
            raise UserError(f"method {kind.name!r} has no option {name!r}; it takes {takes}")  # type: ignore[attr-defined]
        if not any(fits(value, one) for one in known[name]):
            raise UserError(f"{name} is {value!r}; it must be {' or '.join(WORDS[one] for one in known[name])}")

"""Fields of a dataclass against their types: a value of another kind is refused in words when it enters.

Python itself checks nothing: ``2.5`` for a count or ``"x"`` for a number would fail far away, or not at all.
"""

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
"""Types that need no name, and what a user is told of them."""


LARGEST_BITS = 1023
"""Of a whole number that a float can hold."""


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a type: whole numbers are numbers too, true, false and what no float holds are not."""
    if kind in (int, float):
        real = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        return real and (kind is int or not isinstance(value, int) or value.bit_length() <= LARGEST_BITS)
    return isinstance(value, kind)


def word(kind: type) -> str:
    """A type for people."""
    return WORDS.get(kind, f"a {kind.__name__}")


@functools.cache
def types_of(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that each field takes, without those that only say ``Any`` or what cannot be asked for."""
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = tuple(typing.get_origin(part) or part for part in parts)
        if all(isinstance(part, type) for part in plain) and Any not in plain:
            found[field.name] = plain
    return found


def check_types(instance: Any, **names: str) -> None:
    """UserError for the first field of a dataclass whose value is of no type that it takes.

    ``names``: what a field is called in the message, where not by its own name.
    """
    kind: Any = type(instance)
    for field, kinds in types_of(kind).items():
        check_value(names.get(field, field), getattr(instance, field), *kinds)


def check_value(name: str, value: Any, *kinds: type) -> None:
    """UserError where ``value`` is of none of these types."""
    if not any(fits(value, kind) for kind in kinds):
        raise UserError(f"{name} is {short(value)}; it must be {' or '.join(word(kind) for kind in kinds)}")


def check_items(name: str, values: Any, kind: type) -> None:
    """UserError for the first entry of a sequence that is of another type."""
    for at, value in enumerate(values):
        check_value(f"{name}[{at}]", value, kind)


def check_names(what: str, given: Mapping[str, Any], known: typing.Iterable[str]) -> None:
    """UserError for the first name that is none of ``known``."""
    legal = list(known)
    for name in given:
        if name not in legal:
            raise UserError(f"{what} has no option {name!r}; it takes {', '.join(legal) or 'no options'}")


def short(value: Any) -> str:
    """A value for one line."""
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:  # Python refuses to write the longest ones
        return f"a whole number of {value.bit_length()} bits"
    text = " ".join(f"{value!r}".split())
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Types of options, for every command: what a string may be, refused in words that name value, rule and nearest choice.

A type raises ``argparse.ArgumentTypeError`` with the words behind the option's name; ``command.Parser`` puts the name
in front.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.files import check_output_file, check_output_folder, shown

SUFFIX = {"": 1, "k": 1024, "m": 1024 * 1024}
BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
MOST_BYTES = 2**60
LONGEST = 2**31 - 1
"""Tokens that a 32-bit position can count."""
MOST_SHARDS = 1024


def number(kind: type, low: float, high: float | None = None, *, above: bool = False) -> Callable[[str], Any]:
    """A finite number within bounds; ``above``: larger than ``low``, which is not legal itself."""
    most = math.inf if high is None else high

    def rule(value: float) -> str:
        if most >= LONGEST and not value > most:  # so wide a bound is worth a word only to who exceeds it
            return f"above {low}" if above else f"at least {low}"
        return f"between {low} and {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"is {shown(text, 60)!r}; it must be a {noun}, {rule(low)}") from None
        too_low = not (value > low if above else value >= low)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {text}; it must be {rule(low)}, and finite")
        if too_low or value > most:
            nearest = "" if above and too_low else f" (nearest legal choice: {low if too_low else high})"
            raise argparse.ArgumentTypeError(f"is {shown(text, 60)}; it must be {rule(value)}{nearest}")
        return value

    return parse


def count(low: int, high: int = LONGEST) -> Callable[[str], int]:
    """A whole number; the upper bound is what 32 bits hold unless given."""
    return number(int, low, high)


seed = count(0, 2**32 - 1)
shards = count(1, MOST_SHARDS)
tensor_devices = count(1, 64)


def length(text: str) -> int:
    """Tokens: "8192", "8k" (8192), "128k" (131072), "1m" (1048576)."""
    match = re.fullmatch(r"([0-9]{1,18})([km]?)", text.strip().lower())
    tokens = int(match[1]) * SUFFIX[match[2]] if match else 0
    if not 0 < tokens <= LONGEST:
        raise UserError(
            f"length {shown(text, 60)!r} is not a number of tokens; write for example 8192, 8k, 128k or 1m"
            + (f" (at most {LONGEST})" if tokens else "")
        )
    return tokens


def size(least: int) -> Callable[[str], int]:
    """Bytes, "4096", "64M", "1.5g" or "80GiB" in powers of 1024, at least ``least``."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([kmgt]?)(?:i?b)?", text.strip().lower())
        if not match:
            raise argparse.ArgumentTypeError(
                f"is {shown(text, 60)!r}, which is not a size in bytes; write for example 512m or 80g"
            )
        value = int(float(match[1]) * BYTES[match[2]])
        if not least <= value <= MOST_BYTES:
            raise argparse.ArgumentTypeError(
                f"is {shown(text, 60)}; it must be {least} to {MOST_BYTES} bytes (write for example 512m or 80g)"
            )
        return value

    return parse


def lengths(text: str) -> tuple[int, ...]:
    """Lengths separated by commas, each once, in the order given."""
    return tuple(dict.fromkeys(length(part) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Words separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """One of some words; the nearest is proposed."""
    import difflib

    legal = list(choices)

    def parse(text: str) -> str:
        if text in legal:
            return text
        near = difflib.get_close_matches(text, legal, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"is {shown(text, 60)!r}{hint} (one of: {', '.join(legal)})")

    return parse


def output_file(text: str) -> Path:
    """A file that can be written, found out before the work."""
    return _checked(check_output_file, text)


def output_folder(text: str) -> Path:
    """A folder that exists or can be made and written into, found out before the work."""
    return _checked(check_output_folder, text)


def _checked(check: Callable[[str, str], Path], text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; it needs a name")
    try:
        return check(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error

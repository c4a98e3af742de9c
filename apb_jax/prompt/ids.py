"""Token ids given by the caller: taken as they are, or refused in words; never a silently different document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.errors import UserError

Text = str | Sequence[int] | np.ndarray
_LARGEST = int(np.iinfo(np.int32).max)


def make_prompt(document: Text, query: Text, embedded_query: Text | None = None) -> Prompt:
    """A Prompt of token ids, each a one-dimensional row of whole numbers; document and query may not be empty."""
    if isinstance(document, str) or isinstance(query, str) or isinstance(embedded_query, str):
        raise UserError("this model has no tokenizer: give document and query as token ids")
    rows = {"document": as_ids(document, "document"), "query": as_ids(query, "query")}
    for name, ids in rows.items():
        if not len(ids):
            raise UserError(f"the {name} has 0 tokens; it needs at least 1")
    embedded = rows["query"] if embedded_query is None else as_ids(embedded_query, "embedded query")
    return Prompt(rows["document"], rows["query"], embedded)


def as_ids(given: object, name: str) -> np.ndarray:
    """int32 [tokens] of a list or an array of token ids; UserError for anything else.

    Args:
        name: what the ids are, for the message.
    """
    rule = "give text, or a flat list or one-dimensional array of whole numbers"
    if given is None or isinstance(given, str | bytes | bytearray | dict | set) or not hasattr(given, "__len__"):
        raise UserError(f"the {name} is {_kind(given)}, not token ids; {rule}")
    if isinstance(given, list | tuple):
        for at, value in enumerate(given):  # numpy would turn True into 1, and 1 beside 2.5 into 1.0
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise UserError(f"the {name} has {_kind(value)} at index {at}, not a token id; {rule}")
        if any(not 0 <= value <= _LARGEST for value in given):
            at, value = next((at, v) for at, v in enumerate(given) if not 0 <= v <= _LARGEST)
            raise UserError(f"the {name} has {value} at index {at}; token ids lie in 0..{_LARGEST}")
        return np.asarray(given, np.int32).reshape(-1)
    array = np.asarray(given)
    if array.ndim != 1:
        raise UserError(f"the {name} is an array of shape {array.shape}, not one row of token ids; {rule}")
    if not len(array):
        return np.zeros(0, np.int32)
    if array.dtype.kind not in "iu":
        raise UserError(f"the {name} is an array of {array.dtype}, not of token ids; {rule}")
    bad = np.flatnonzero((array < 0) | (array > _LARGEST))
    if len(bad):
        raise UserError(f"the {name} has {array[bad[0]]} at index {bad[0]}; token ids lie in 0..{_LARGEST}")
    return array.astype(np.int32)


def _kind(value: object) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"

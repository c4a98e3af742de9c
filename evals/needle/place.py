"""Putting a needle into a haystack at a depth, in tokens, at the end of a sentence."""

from collections.abc import Sequence

from evals.base import EvalError
from evals.tokens import Tokens

# Tokens both published programs keep free for the question.
BUFFER = 200


def fill(text_ids: Sequence[int], length: int) -> list[int]:
    """First ``length`` ids of a text that starts over where it ends."""
    if not text_ids:
        raise EvalError("the haystack text holds no tokens")
    return (list(text_ids) * (-(-length // len(text_ids))))[:length]


def insert(tokens: Tokens, haystack: Sequence[int], needle: str, depth: float) -> str:
    """Text of the haystack with the needle at ``depth`` percent, moved back to the end of a sentence.

    Depth 100 appends; where no bare full stop stands before the place, the needle goes to the start. Only the
    token of ``.`` alone counts as a full stop, as in the published programs.
    """
    needle_ids = list(tokens.encode(needle))
    place = len(haystack)
    if depth < 100:
        stop = tokens.encode(".")[-1]
        place = int(len(haystack) * depth / 100)
        while place > 0 and haystack[place - 1] != stop:
            place -= 1
    return tokens.decode([*haystack[:place], *needle_ids, *haystack[place:]])

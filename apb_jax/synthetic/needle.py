"""The needle behind ``--needle``: a number hidden in a long document, and the question about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import filler, novel
from apb_jax.synthetic.sample import Line, Piece, fill, length_of, text_of
from apb_jax.synthetic.vocabulary import vocabulary


@dataclass(frozen=True)
class NeedlePrompt:
    """A document with a needle in it, the question about it, and the number that answers it."""

    document: str
    query: str
    answer: str


def needle_prompt(tokenizer: Any, tokens: int, digits: str, depth: float, seed: int) -> NeedlePrompt:
    """A document of ``tokens`` - 128 to ``tokens`` tokens, the needle at ``depth`` (0 start .. 1 end).

    The haystack is the packaged novel or the packaged filler, the key is drawn from words that no key of the tiny
    model's training held; both follow from ``seed``. Raises UserError for what is no number, no depth, or no room.
    """
    if not (digits.isascii() and digits.isdigit()):
        raise UserError(f"the needle is {digits!r}; it must be a number written in digits, such as 7481923")
    if not 0.0 <= depth <= 1.0:
        raise UserError(f"depth is {depth}; it must lie between 0 (start of the document) and 1 (its end)")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")
    rng = np.random.default_rng(seed)
    encoder = Encoder(tokenizer)
    adjective, noun = vocabulary(held_out=True).keys(rng, 1)[0]
    key = f"{adjective}-{noun}"
    needle: Line = (Piece(f" One of the special magic numbers for {key} is: "), Piece(digits), Piece("."))
    least = length_of(needle, encoder)
    if tokens < least:
        raise UserError(
            f"a document of {max(0, tokens)} tokens cannot hold the needle, which has {least}; ask for at least "
            f"{least - tokens} more"
        )
    haystack = novel() if rng.random() < 0.5 else filler()
    # The first word loses its space below, which may cost a few tokens more.
    lines = fill(rng, encoder, haystack.order(rng), [needle], max(least, tokens - 8), depths=[depth])
    question = f"What is the special magic number for {key} mentioned in the provided text?"
    return NeedlePrompt(text_of(lines).lstrip(" "), question, digits)

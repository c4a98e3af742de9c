"""Samples: a document, questions about it and their answers, as pieces of text that tokenise one by one.

Pieces are cut where the tokenizer cuts, so the tokens of a sample are the concatenated tokens of its pieces. A piece
has a role, which says how much training cares to predict it; evaluation ignores roles and joins the text.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from apb_jax.synthetic.encoder import Encoder


class Role(enum.Enum):
    """What a piece is to the loss."""

    TEXT = "text"  # running text, predicted with a small weight
    SECRET = "secret"  # drawn at random: nothing to learn from predicting it
    ANSWER = "answer"  # follows from the document
    VALUE = "value"  # an answer's value: its first two tokens decide which value it is
    REPEAT = "repeat"  # said before: free to choose, but after its first token the rest follows


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text and its role."""

    text: str
    role: Role = Role.TEXT


Line = tuple[Piece, ...]


@dataclass(frozen=True)
class Question:
    """A question and its answer. ``values`` are the strings the answer must contain, all of them."""

    text: Line
    answer: Line
    values: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One document with the questions that can be asked about it."""

    task: str
    document: tuple[Line, ...]
    questions: tuple[Question, ...]

    @property
    def document_text(self) -> str:
        """The document as one string (it starts with the separator of its first piece)."""
        return text_of(self.document)


def text_of(lines: tuple[Line, ...]) -> str:
    """Pieces joined."""
    return "".join(piece.text for line in lines for piece in line)


def tokens_of(lines: tuple[Line, ...], encoder: Encoder) -> np.ndarray:
    """int32 [n]: equal to encoding ``text_of(lines)`` at once."""
    parts = [encoder(piece.text) for line in lines for piece in line]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def length_of(line: Line, encoder: Encoder) -> int:
    """Tokens of one line."""
    return sum(len(encoder(piece.text)) for piece in line)


def digits(rng: np.random.Generator, low: int, high: int) -> str:
    """A random number of ``low`` to ``high`` digits, without a leading zero."""
    count = int(rng.integers(low, high + 1))
    drawn = rng.integers(0, 10, count)
    drawn[0] = rng.integers(1, 10)
    return "".join(map(str, drawn))


def different_digits(rng: np.random.Generator, count: int, low: int, high: int) -> list[str]:
    """``count`` different numbers."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[digits(rng, low, high)] = None
    return list(found)


def fill(
    rng: np.random.Generator,
    encoder: Encoder,
    haystack: Iterator[str],
    lines: list[Line],
    tokens: int,
    *,
    depths: list[float] | None = None,
    opening: Line = (),
) -> tuple[Line, ...]:
    """``lines`` put between sentences of ``haystack`` so that the document has at most ``tokens`` tokens.

    Lines keep their order; they stand at ``depths`` (0 start .. 1 end of the document), drawn uniformly if not given.
    """
    room = tokens - length_of(opening, encoder) - sum(length_of(line, encoder) for line in lines)
    body: list[Line] = []
    for sentence in haystack:
        cost = len(encoder(sentence))
        if cost > room:
            break
        body.append((Piece(sentence),))
        room -= cost
    if depths is None:
        depths = sorted(rng.random(len(lines)).tolist())
    gaps = [round(depth * len(body)) for depth in depths]
    out: list[Line] = [opening] if opening else []
    done = 0
    for gap, line in zip(gaps, lines, strict=True):
        out.extend(body[done:gap])
        out.append(line)
        done = max(done, gap)
    out.extend(body[done:])
    return tuple(out)

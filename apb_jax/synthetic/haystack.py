"""Haystacks: running text cut into sentences that needles can be put between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apb_jax.errors import UserError
from apb_jax.files import read_json
from apb_jax.files import read_text as read_text_file
from apb_jax.synthetic.packaged import FILLER, NOVEL

MAX_WORDS = 28
"""Longer sentences are cut, so that a haystack can be filled to within one short piece of any length."""


@dataclass(frozen=True)
class Haystack:
    """Sentences, each with its leading space; ``shuffled``: their order means nothing, so it is drawn anew."""

    sentences: tuple[str, ...]
    shuffled: bool = False

    def __post_init__(self) -> None:
        if not self.sentences:
            raise UserError("a haystack needs at least one sentence; the text given holds none")

    def order(self, rng: np.random.Generator) -> Iterator[str]:
        """Sentences without end: from a random one on, cyclically (running text), or drawn one by one (filler)."""
        n = len(self.sentences)
        at = int(rng.integers(n))
        while True:
            yield self.sentences[at]
            at = int(rng.integers(n)) if self.shuffled else (at + 1) % n


def sentences(text: str) -> tuple[str, ...]:
    """Sentences of running text with white space normalised, none longer than ``MAX_WORDS`` words."""
    out: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        words = sentence.split(" ")
        for i in range(0, len(words), MAX_WORDS):
            piece = " ".join(words[i : i + MAX_WORDS])
            if piece:
                out.append(" " + piece)
    return tuple(out)


def filler() -> Haystack:
    """The packaged filler, its sentences in random order."""
    lines = FILLER.read_text(encoding="utf-8").splitlines()
    return Haystack(tuple(" " + line.strip() for line in lines if line.strip()), shuffled=True)


def novel() -> Haystack:
    """The packaged real text, from a random sentence on."""
    return Haystack(sentences(NOVEL.read_text(encoding="utf-8")))


def read_text(path: Path) -> str:
    """Text of a data file: plain text, JSON ``{"text": ...}``, or the layout of SQuAD."""
    if path.suffix != ".json":
        return read_text_file(path, "data file")
    record = read_json(path, "data file")
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("data"), list):
        try:
            return "\n".join(p["context"] for article in record["data"] for p in article["paragraphs"])
        except (KeyError, TypeError) as error:
            raise UserError(f"data file {path} is damaged: SQuAD's {error} is not as it should be") from error
    raise UserError(f'data file {path} holds neither {{"text": ...}} nor the layout of SQuAD')


def split_held_out(text: str, share: float = 0.1) -> tuple[Haystack, Haystack]:
    """Running text as a training part and the last ``share`` of it, held out."""
    pieces = sentences(text)
    cut = max(1, int(len(pieces) * (1 - share)))
    return Haystack(pieces[:cut]), Haystack(pieces[cut:] or pieces[-1:])

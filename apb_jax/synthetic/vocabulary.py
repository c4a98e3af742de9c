"""Words and names for keys, split in a training part and a held-out part that no training text ever names as a key.

Adjectives and nouns: wonderwords 2.2.0 (MIT), the lists that RULER draws its keys from.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache

import numpy as np

from apb_jax.synthetic.packaged import word_list

HELD_OUT_EVERY = 10
VARIABLE_NAMES = 24_000

PEOPLE = (
    "Adam Alice Anna Arthur Ben Bella Carl Clara Daniel Diana Edgar Ellen Emma Erik Felix Fiona Frank George "
    "Grace Hannah Harry Helen Henry Hugo Ida Irene Jack James Jane John Karl Kate Laura Leo Lucy Maria Mark "
    "Martha Max Mia Nina Nora Oliver Oscar Otto Paul Peter Philip Rosa Robert Ruth Sam Sarah Simon Sophie "
    "Thomas Tom Vera Victor Walter"
).split()


@dataclass(frozen=True)
class Vocabulary:
    """Where keys are drawn from: adjectives and nouns (keys are ``adjective-noun``), variables, people."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    variables: tuple[str, ...]
    people: tuple[str, ...]

    def keys(self, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
        """``count`` different (adjective, noun) pairs."""
        wanted: dict[tuple[str, str], None] = {}
        while len(wanted) < count:
            a = self.adjectives[int(rng.integers(len(self.adjectives)))]
            wanted[a, self.nouns[int(rng.integers(len(self.nouns)))]] = None
        return list(wanted)

    def names(self, rng: np.random.Generator, count: int) -> list[str]:
        """``count`` different variable names of five capitals."""
        return [self.variables[i] for i in rng.choice(len(self.variables), count, replace=False)]

    def persons(self, rng: np.random.Generator, count: int) -> list[str]:
        """``count`` different first names (shared by training and evaluation: there are only a few)."""
        return [self.people[i] for i in rng.choice(len(self.people), count, replace=False)]


def _plain_words(name: str) -> list[str]:
    words = " ".join(word_list(name)).split()  # "ad hoc" as two: the split below was drawn so before tiny was trained
    return sorted({w for w in words if w.isascii() and w.isalpha() and w.islower()})


def _split(words: list[str], held_out: bool) -> tuple[str, ...]:
    return tuple(w for i, w in enumerate(words) if (i % HELD_OUT_EVERY == 0) == held_out)


@cache
def vocabulary(held_out: bool) -> Vocabulary:
    """The training vocabulary, or the tenth of the words that training never uses in a key."""
    letters = np.random.default_rng(0).integers(0, 26, (VARIABLE_NAMES, 5))
    names = sorted({"".join(string.ascii_uppercase[i] for i in row) for row in letters})
    return Vocabulary(
        adjectives=_split(_plain_words("adjectivelist"), held_out),
        nouns=_split(_plain_words("nounlist"), held_out),
        variables=_split(names, held_out),
        people=tuple(PEOPLE),
    )

"""Random numbers, words and uuids, drawn in the order in which the original programs draw them."""

import random
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TypeVar

import numpy as np

from apb_jax.synthetic.packaged import word_list

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

T = TypeVar("T")


class Draws:
    """The two random streams of a RULER program (Python's and numpy's) and its fixed shuffles."""

    def __init__(self, seed: int):
        self.seed = seed
        self.py = random.Random(seed)
        self.np = np.random.RandomState(seed)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Shuffle with a fresh generator: the same permutation for the same number of items, every time."""
        result = list(items)
        random.Random(self.seed).shuffle(result)
        return result

    def number(self) -> str:
        return str(self.py.randint(10**6, 10**7 - 1))

    def word(self) -> str:
        return self.py.choice(key_vocabulary())

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.py.getrandbits(128), version=4))

    def atom(self, kind: str) -> str:
        return {"numbers": self.number, "words": self.word, "uuids": self.uuid}[kind]()

    def letters(self, alphabet: str, count: int) -> str:
        return "".join(self.py.choices(alphabet, k=count))


@cache
def word_vocabulary(seed: int) -> tuple[str, ...]:
    """All distinct words, sorted, then shuffled with ``seed`` (common words extraction)."""
    words = sorted({*word_list("nounlist"), *word_list("adjectivelist"), *word_list("verblist")})
    random.Random(seed).shuffle(words)
    return tuple(words)


@cache
def key_vocabulary() -> "KeyVocabulary":
    return KeyVocabulary(word_list("adjectivelist"), word_list("nounlist"))


class KeyVocabulary(Sequence[str]):
    """The sorted set of all ``adjective-noun`` strings (6 million), computed an entry at a time.

    Sorted by adjective first, except where one adjective and a hyphen start another ("well", "well-made"):
    such adjectives form a group whose few entries are sorted outright.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]):
        self._nouns = sorted(set(nouns))
        self._groups: list[list[str]] = []
        for adjective in sorted({f"{a}-" for a in adjectives}):
            if self._groups and adjective.startswith(self._groups[-1][0]):
                self._groups[-1].append(adjective)
            else:
                self._groups.append([adjective])
        self._mixed = {
            i: sorted({a + n for a in group for n in self._nouns})
            for i, group in enumerate(self._groups)
            if len(group) > 1
        }
        sizes = (len(self._mixed.get(i, self._nouns)) for i in range(len(self._groups)))
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        offset = index - (self._ends[group - 1] if group else 0)
        if group in self._mixed:
            return self._mixed[group][offset]
        return self._groups[group][0] + self._nouns[offset]

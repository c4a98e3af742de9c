"""Frequent words extraction: the three most frequent coded words of a Zipf-distributed text."""

import string
from collections.abc import Callable

import numpy as np
from scipy.special import zeta

from evals.base import EvalError
from evals.ruler.atoms import Draws
from evals.ruler.prompt import Form
from evals.ruler.sizing import Draft

ALPHA = 2.0
NOISE_WORD = "..."


class FweMaker:
    """Builds prompts whose number of words is found while the vocabulary stays fixed."""

    def __init__(self, form: Form, draws: Draws, *, max_tokens: int, count: Callable[[Draft], int]):
        self._form, self._draws = form, draws
        self._max_tokens, self._count = max_tokens, count
        self._vocabulary_size, self._step = max_tokens // 50, max_tokens // 32
        if self._vocabulary_size < 4 or self._step < 1:
            raise EvalError(f"frequent words needs a length of at least 256 tokens, got {max_tokens}")

    def build(self, words: int | None = None, *, exact: bool = False) -> tuple[Draft, int]:
        """A prompt and its number of words: searched from scratch, or at most ``words``.

        ``exact`` searches to the word instead of in steps of a 32nd of the length.
        """
        vocabulary = self._vocabulary()
        if exact:
            return self._largest(vocabulary, words)
        if words is None:
            words = self._max_tokens // 6
            draft = self._draft(vocabulary, words)
            while self._count(draft) < self._max_tokens:
                words += self._step
                draft = self._draft(vocabulary, words)
            words -= self._step
        draft = self._draft(vocabulary, words)
        while self._count(draft) > self._max_tokens:
            words -= self._step
            if words < 100:
                raise EvalError(f"frequent words: no text fits {self._max_tokens} tokens; use a longer length")
            draft = self._draft(vocabulary, words)
        return draft, words

    def _largest(self, vocabulary: list[str], words: int | None) -> tuple[Draft, int]:
        lower, upper, best = 20, words or self._max_tokens, None
        while lower <= upper:
            middle = (lower + upper) // 2
            draft = self._draft(vocabulary, middle)
            if self._count(draft) <= self._max_tokens:
                best, lower = (draft, middle), middle + 1
            else:
                upper = middle - 1
        if best is None:
            raise EvalError(f"frequent words: no text fits {self._max_tokens} tokens; use a longer length")
        return best

    def _vocabulary(self) -> list[str]:
        words = [self._draws.letters(string.ascii_lowercase, 6) for _ in range(self._vocabulary_size)]
        while len(set(words)) < self._vocabulary_size:
            words.append(self._draws.letters(string.ascii_lowercase, 6))
        vocabulary = self._draws.shuffled(sorted(set(words)))
        vocabulary[0] = NOISE_WORD
        return vocabulary

    def _draft(self, vocabulary: list[str], words: int) -> Draft:
        ranks = np.arange(1, len(vocabulary) + 1, dtype=np.float64)
        times = (words * ranks**-ALPHA / zeta(ALPHA)).astype(int)
        text = [word for word, repeats in zip(vocabulary, times, strict=True) for _ in range(repeats)]
        answer = vocabulary[1:4]
        if text.count(answer[-1]) == 0:
            raise EvalError(f"frequent words: {words} words are too few for three ranks; use a longer length")
        return Draft(
            document=self._form.document(context=" ".join(self._draws.shuffled(text))),
            query=self._form.query(query=""),
            references=tuple(answer),
            info={"words": len(text)},
        )

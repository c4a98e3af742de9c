"""STRING's four needles: four numbers in essays, all asked at once; two found make a pass."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evals.base import EvalError, Example, text_facts
from evals.needle.task import templates
from evals.tokens import Tokens

NEEDLES = 4
ANSWER_TOKENS = 128


@dataclass(frozen=True)
class FourNeedlesTask:
    """STRING's test at one length; the keys are drawn once and only their depths vary between tests.

    Attributes:
      fits: stop at the last prompt within the budget; the original takes the first one that exceeds it.
      llama31_question: the original's question for models whose path contains llama3.1.
    """

    tokens: Tokens
    text: str
    text_name: str
    length: int
    samples: int = 500
    seed: int = 42
    fits: bool = True
    llama31_question: bool = False

    name = "needle4"
    metric = "passed (2 of 4 found)"

    def __post_init__(self) -> None:
        if self.length <= ANSWER_TOKENS + 200:
            raise EvalError(f"needle4: length {self.length} is too short; the shortest legal length is 400")

    def score(self, example: Example, text: str) -> float:
        """1 for a pass: at least two of the four keys found."""
        flat = " ".join(text.split()).lower()
        return float(sum(key in flat for key in example.references) >= 2)

    def describe(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "data": text_facts(self.text_name, self.text),
            "fits": self.fits,
            "question": "llama3.1" if self.llama31_question else "default",
            "max_new_tokens": ANSWER_TOKENS,
        }

    def examples(self) -> Iterator[Example]:
        texts = templates()["string4"]
        rng = random.Random(self.seed)
        keys = [str(rng.randint(100000, 1000000)) for _ in range(NEEDLES)]
        width = 0.99 / NEEDLES
        budget = self.length - ANSWER_TOKENS
        pieces = self._pieces(50 if budget > 64000 else 1)
        question = texts["question_llama31" if self.llama31_question else "question"]
        start = None
        for index in range(self.samples):
            depths = [j * width + rng.uniform(0, width) for j in range(NEEDLES)]
            body, start = self._build(pieces, keys, depths, budget, texts, question, start)
            document = texts["task"] + body
            places = [round(document.find(key) / len(document), 4) for key in keys]
            yield Example(
                id=str(index),
                document=document,
                query=question,
                references=tuple(keys),
                max_new_tokens=ANSWER_TOKENS,
                info={"depths": places},
            )

    def _pieces(self, step: int) -> list[str]:
        sentences = self.text.split(".")
        return [".".join(sentences[i : i + step]) for i in range(0, len(sentences), step)]

    def _build(self, pieces, keys, depths, budget, texts, question, start) -> tuple[str, int]:
        """Grow by a piece at a time; later tests start near the first one's size, as their size hardly differs."""
        count = max(NEEDLES, (start or NEEDLES) - 8)
        body = self._text(self._take(pieces, count), keys, depths, texts)
        if start is not None and self._tokens(body, texts, question) > budget:
            count = NEEDLES
            body = self._text(self._take(pieces, count), keys, depths, texts)
        jump = max(1, len(pieces) // 4)
        while jump:  # growing strides: the smallest count above the budget, found without trying every one
            bigger = self._text(self._take(pieces, count + jump), keys, depths, texts)
            if self._tokens(bigger, texts, question) > budget:
                jump //= 2
                continue
            count, body = count + jump, bigger
        if self._tokens(body, texts, question) > budget:
            raise EvalError(f"needle4: length {self.length} is too short for four needles")
        if not self.fits:
            count += 1
            body = self._text(self._take(pieces, count), keys, depths, texts)
        return body, count

    def _take(self, pieces: list[str], count: int) -> list[str]:
        return (pieces * (-(-count // len(pieces))))[:count]

    def _tokens(self, body: str, texts, question: str) -> int:
        return self.tokens.count(texts["task"]) + self.tokens.count(body + question)

    def _text(self, pieces: list[str], keys, depths, texts) -> str:
        text, start = "", 0
        for j, (key, depth) in enumerate(zip(keys, depths, strict=True)):
            place = 0 if j == 0 else int(depth * len(pieces))
            text += ".".join(pieces[start:place]) + ". " + texts["needle"].format(key=key)
            start = place
        return (text + ". ".join(pieces[start:]) + ". \n").removeprefix(".")

"""Needle in a haystack on a grid of lengths and depths."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from evals.base import EvalError, Example, require_choice, text_facts
from evals.needle.place import BUFFER, fill, insert
from evals.ruler.atoms import key_vocabulary
from evals.ruler.niah import NEEDLE
from evals.ruler.prompt import make_form
from evals.tokens import Tokens

FORMS = ("ruler", "minference")


@cache
def templates() -> dict[str, Any]:
    return json.loads(files("evals.needle").joinpath("templates.json").read_text(encoding="utf-8"))


def even_depths(count: int) -> tuple[int, ...]:
    """``count`` depths from 0 to 100 percent."""
    if count < 1:
        raise EvalError(f"--depths must be at least 1, got {count}")
    return tuple(int(depth) for depth in np.round(np.linspace(0, 100, count)))


@dataclass(frozen=True)
class HeatmapTask:
    """One column of the heat map: every depth at one length, ``rounds`` times.

    Attributes:
      text: the haystack; round i starts reading it at another place.
      length: tokens of the prompt (200 of them are kept free for the question) and the answer.
      depths: percent of the haystack before the needle.
      form: ``ruler``: RULER's needle sentence and question; ``minference``: "The special magic Paris number is:
        1234567" and MInference's question.
    """

    tokens: Tokens
    text: str
    text_name: str
    length: int
    depths: tuple[int, ...]
    rounds: int = 1
    seed: int = 42
    form: str = "ruler"
    max_new_tokens: int = 32

    name = "needle"
    metric = "number found"

    def __post_init__(self) -> None:
        require_choice("needle form", self.form, FORMS)
        if self.rounds < 1:
            raise EvalError(f"--rounds must be at least 1, got {self.rounds}")
        if self.length < 2 * BUFFER:
            raise EvalError(f"needle: length {self.length} is too short; the shortest legal length is {2 * BUFFER}")

    def score(self, example: Example, text: str) -> float:
        """1 if the number's digits are a substring of the answer."""
        return float(example.references[0] in text)

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "seed": self.seed,
            "depths": list(self.depths),
            "rounds": self.rounds,
            "data": text_facts(self.text_name, self.text),
            "max_new_tokens": self.max_new_tokens,
        }

    def examples(self) -> Iterator[Example]:
        # A stream of its own for each length: lengths may be added or left out without moving other samples.
        rng = random.Random(f"{self.seed} {self.length}")
        ids = list(self.tokens.encode(self.text))
        for turn in range(self.rounds):
            start = len(ids) * turn // self.rounds
            rotated = ids[start:] + ids[:start]
            for depth in self.depths:
                key, number = self._key(rng), str(rng.randint(10**6, 10**7 - 1))
                document, query = self._prompt(rotated, depth, key, number)
                yield Example(
                    id=f"{turn}-{depth}",
                    document=document,
                    query=query,
                    references=(number,),
                    max_new_tokens=self.max_new_tokens,
                    info={"depth": depth, "round": turn, "key": key},
                )

    def _key(self, rng: random.Random) -> str:
        return rng.choice(key_vocabulary() if self.form == "ruler" else templates()["minference"]["cities"])

    def _prompt(self, ids: list[int], depth: int, key: str, number: str) -> tuple[str, str]:
        if self.form == "minference":
            texts = templates()["minference"]
            needle = texts["needle"].format(city=key, rnd_number=number)
            before, after = texts["template"].format(context="\0", question=texts["question"].format(key)).split("\0")
        else:
            form = make_form("niah", corrected_spelling=True, singular=True)
            needle = " " + NEEDLE.format(kind="numbers", key=key, value=number)
            before, after = form.document(type_needle_v="number", context="\0").split("\0")
            after += form.query(type_needle_v="number", query=key)
        room = self.length - BUFFER - len(self.tokens.encode(needle))
        context = insert(self.tokens, fill(ids, room), needle, depth)
        # The question belongs to the query; the line break before it to the document.
        cut = len(after) - len(after.lstrip("\n"))
        return before + context + after[:cut], after[cut:]

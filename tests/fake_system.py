"""A small real system to evaluate: it answers by regular expressions and forgets what its method does not see.

Run as a program it is ``python -m evals`` on that system; ``--model slow`` waits a little on every answer.
"""

import re
import sys
import time
from collections import Counter

import numpy as np

from evals.base import Completion, EvalError, Scored
from evals.cli import main
from evals.tokens import Tokens

METHODS = {"full": 1.0, "forgetful": 0.55}


class WordTokens:
    """Lossless tokenizer: words, punctuation and runs of white space, numbered as they are met."""

    def __init__(self):
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.findall(r"\s+|\w+|[^\w\s]", text):
            if piece not in self._ids:
                self._ids[piece] = len(self._texts)
                self._texts.append(piece)
            ids.append(self._ids[piece])
        return ids

    def decode(self, ids) -> str:
        return "".join(self._texts[i] for i in ids)


def word_tokens() -> Tokens:
    tokenizer = WordTokens()
    return Tokens("words", tokenizer.encode, tokenizer.decode)


class RegexSystem:
    """Finds needles, pass keys and variable chains in the share of the document it remembers (start and end)."""

    def __init__(self, method: str = "full", max_length: int | None = None, delay: float = 0.0):
        self.method, self.max_length, self._delay = method, max_length, delay
        self.tokens = word_tokens()
        self.calls = 0

    def count(self, text: str) -> int:
        return self.tokens.count(text)

    def generate(self, document, query, max_new_tokens, *, embedded_query=None, ignore_stop=False):
        started = time.perf_counter()
        self.calls += 1
        time.sleep(self._delay)
        share = METHODS[self.method] / 2
        seen = document
        if share < 0.5:
            seen = document[: int(len(document) * share)] + document[-int(len(document) * share) :]
        text = self._answer(seen, query)
        prompt = self.count(document) + self.count(query)
        middle = time.perf_counter()
        return Completion(
            text=text,
            prompt_tokens=prompt,
            generated_tokens=max_new_tokens if ignore_stop else min(max_new_tokens, max(1, self.count(text))),
            prefill_s=middle - started,
            decode_s=time.perf_counter() - middle + 1e-6,
            facts={"method": self.method, "share of the document": METHODS[self.method]},
        )

    def _answer(self, document: str, query: str) -> str:
        value = re.search(r"assigned the value (\d+)", query)
        if value:
            names = [found.group(1) for found in re.finditer(rf"VAR (\w+) = {value.group(1)}", document)]
            for before, name in ((f.group(2), f.group(1)) for f in re.finditer(r"VAR (\w+) = VAR (\w+)", document)):
                if before in names:
                    names.append(name)
            return ", ".join(names)
        city = re.search(r"the special magic (.+?) number\?", query)
        if city:
            return " ".join(re.findall(rf"special magic {city.group(1)} number is: (\d+)", document)) or "no idea"
        asked = re.search(r"special magic (?:number|uuid)s? for (.+?) mentioned", query)
        if asked:
            names = re.split(", and |, ", asked.group(1))
            return " ".join(v for name in names for v in re.findall(rf"for {re.escape(name)} is: ([\w-]+)", document))
        return " ".join(re.findall(r"magic number is: (\d+)", document)) or "no idea"

    def log_probs(self, document, segment):
        counts = Counter(document[-int(len(document) * METHODS[self.method]) :])
        total = sum(counts.values()) + 20_000
        result = []
        for token in segment:
            result.append(np.log((counts[token] + 1) / total))
            counts[token] += 1
            total += 1
        return Scored(np.asarray(result, np.float32), {"method": self.method})

    def describe(self):
        return {"model": "regex", "method": self.method}


def connect(spec):
    if spec.model not in ("regex", "slow", "small"):
        raise EvalError(f"unknown model {spec.model!r}")
    for method in spec.methods:
        if method not in METHODS:
            raise EvalError(f"unknown method {method!r}")
    limit = 4096 if spec.model == "small" else None
    delay = 0.02 if spec.model == "slow" else 0.0
    return lambda method: RegexSystem(method, limit, delay)


def run(argv: list[str]) -> int:
    return main(argv, connect=connect)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

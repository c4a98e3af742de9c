"""Documents for the tests of the server, and waiting for its thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def book(seed: int, sentences: int = 40) -> str:
    """A text of about ten tokens a sentence, another one for every seed; no blank line in it."""
    words = "harbour lantern mountain river teacher garden winter letter engine valley music stone".split()
    pick = lambda i: words[(i * i * 7 + seed * 13 + i) % len(words)]  # noqa: E731
    return "\n".join(f"The {pick(i)} of day {seed * 31 + i} saw a {pick(i + 1)} near the {pick(i + 2)}."
                     for i in range(sentences))  # fmt: skip


def ask(text: str, question: str) -> list[dict[str, str]]:
    """A conversation of one message: a document, a blank line, a question."""
    return [{"role": "user", "content": f"{text}\n\n{question}"}]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)

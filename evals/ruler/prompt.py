"""RULER's task templates and chat wrappers, and how each published program glues them together."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from evals.base import EvalError, require_choice

FAMILIES = ("niah", "vt", "cwe", "fwe", "qa", "passkey")

# Pass keys are not one of RULER's tasks; the wording is InfiniteBench's (yarn templates).
_PASSKEY = {
    "template": "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information.\n\n{context}\n\nWhat is the pass key?",
    "answer_prefix": "\n\nThe pass key is",
}


@cache
def _benchmark_text() -> dict[str, Any]:
    return json.loads(files("evals.ruler").joinpath("templates.json").read_text(encoding="utf-8"))


def wrapper_names() -> tuple[str, ...]:
    """Names of the chat wrappers, ``base`` (none) first."""
    return tuple(_benchmark_text()["wrappers"])


@dataclass(frozen=True)
class Form:
    """The five consecutive pieces of a prompt; ``str.format`` fields are still open.

    ``head + context`` is the document part, ``question + tail + answer_prefix`` the query part.
    """

    head: str
    context: str
    question: str
    tail: str
    answer_prefix: str

    def document(self, **fields: Any) -> str:
        return (self.head + self.context).format(**fields)

    def query(self, **fields: Any) -> str:
        return (self.question + self.tail + self.answer_prefix).format(**fields)


def make_form(
    family: str,
    *,
    wrapper: str = "base",
    corrected_spelling: bool = False,
    singular: bool = False,
    keep_wrapper_grammar: bool = False,
) -> Form:
    """Build the prompt form of a task family.

    Args:
      family: one of FAMILIES.
      wrapper: name of a chat wrapper, see ``wrapper_names()``.
      corrected_spelling: RULER's main branch writes ``assigned`` where the older programs write ``assgined``.
      singular: one key, one value: the originals then rewrite the wording, chat wrapper included, so that a
        system line becomes "You is a helpful assistant."
      keep_wrapper_grammar: leave the wrapper out of that rewriting (differs from every published score).
    """
    require_choice("task family", family, FAMILIES)
    wrapper_text = _benchmark_text()["wrappers"][require_choice("chat wrapper", wrapper, wrapper_names())]
    head, tail = wrapper_text.split("{task_template}")
    texts = _PASSKEY if family == "passkey" else _benchmark_text()["templates"][family]
    prefix = texts["answer_prefix"]
    if corrected_spelling and family == "vt":
        prefix = texts["answer_prefix_main"]
    body = texts["template"]
    cut = body.index("{context}") + len("{context}")
    while body[cut] == "\n":
        cut += 1
    context, question = body[:cut], body[cut:]
    if singular:
        context, question, prefix = _singular(context), _singular(question), _singular(prefix)
        if not keep_wrapper_grammar:
            head, tail = _singular(head), _singular(tail)
    return Form(head, context, question, tail, prefix)


def _singular(text: str) -> str:
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, one)
    return text


_QUERY_STARTS = (
    "What are all the special magic ",
    "What is the special magic ",
    "Question: Find all variables",
    "Question: What are the 10 most common",
    "Question: Do not provide any explanation.",
    "Answer the question based on the given documents.",
    "What is the pass key?",
)


def split_prompt(prompt: str) -> tuple[str, str]:
    """Cut a RULER prompt given as one string into (document, query), before the last start of its question."""
    cut = max(prompt.rfind(start) for start in _QUERY_STARTS)
    if cut < 0:
        raise EvalError(
            f"no RULER question found in a prompt of {len(prompt)} characters: pass document and query apart"
        )
    return prompt[:cut], prompt[cut:]

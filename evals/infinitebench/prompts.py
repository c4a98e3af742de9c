"""Prompts of the twelve tasks in each published template set, split into document and query, cut in the middle."""

import re
from dataclasses import dataclass
from typing import Any

from evals.base import EvalError, require_choice
from evals.infinitebench.records import Record, templates
from evals.tokens import Tokens

# gpt4 and yarn are the official ones; the apb sets wrap the yarn texts into a chat.
SETS = ("yarn", "gpt4", "apb-llama", "apb-qwen", "apb-yi", "string-qwen2")


@dataclass(frozen=True)
class PromptText:
    """``document + query`` is the prompt; ``embedded`` is what APB hands to its compressor with the anchor."""

    document: str
    query: str
    embedded: str


def fields_of(task: str, record: Record) -> dict[str, str]:
    """The values of a template's format fields."""
    values = {"context": record.context, "input": record.input, "question": record.input}
    if task == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", record.input)
        if call is None:
            raise EvalError(f"code_run record {record.id}: no call like func_12(-3) in its input {record.input!r}")
        values |= {"func_call": call.group(), "func": call.group().split("(")[0]}
    if task == "math_find":
        found = re.search(r"The .+ of", record.input)
        if found is None:
            raise EvalError(f"math_find record {record.id}: no 'The ... of' in its input {record.input!r}")
        values["prefix"] = f"What is {found.group().lower()[:-3]} in the following list?"
    for letter, option in zip("ABCD", record.options, strict=False):
        values[f"OPTION_{letter}"] = option
    return values


def make_prompt(task: str, record: Record, template_set: str) -> PromptText:
    """Fill the templates. The document ends where the question begins."""
    require_choice("template set", template_set, SETS)
    values = fields_of(task, record)
    apb = templates()["apb"]
    if template_set.startswith("apb"):
        family = template_set.removeprefix("apb-")
        document = apb["noquery"][task].format(**values)
        if family == "yi":
            prompt = templates()["yarn"][task].replace("$$MASK$$", "**MASK**").format(**values)
            document += "\n\n" if task == "longbook_sum_eng" else ""
        else:
            wrapper = apb[family]
            prompt = wrapper["head"] + apb["body"][task].format(**values)
            prompt += wrapper["tail"] + apb["cue"][task].format(**values)
            document = wrapper["head"] + document
    else:
        source = templates()["gpt4" if template_set == "gpt4" else "yarn"][task]
        if template_set == "string-qwen2":
            source = "<|im_start|>\n" + source
        prompt = source.format(**values)
        document = _before_question(source).format(**values)
    if not prompt.startswith(document):
        raise EvalError(f"{task}, {template_set}: the document part does not start the prompt")
    query = prompt[len(document) :]
    if not query.strip():
        raise EvalError(f"{task}: template set {template_set!r} ends with the context, no query is left; use 'yarn'")
    return PromptText(document, query, _embedded(task, record, values))


def _before_question(template: str) -> str:
    """The template up to and including the line breaks behind its context."""
    cut = template.index("{context}") + len("{context}")
    while template[cut : cut + 1] == "\n":
        cut += 1
    return template[:cut]


def _embedded(task: str, record: Record, values: dict[str, str]) -> str:
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", record.options, strict=False))
    special = {
        "longbook_choice_eng": f"Question: {record.input}\n{options}",
        "code_debug": f"Options:\n{options}\n\nThe correct option is:",
        "longdialogue_qa_eng": "The name that has been replaced with **MASK** is likely",
        "code_run": f"The value of {values.get('func_call')} is",
        "math_calc": "Values:",
    }
    return special.get(task, record.input)


def cut_middle(tokens: Tokens, prompt: PromptText, most: int) -> tuple[PromptText, dict[str, Any]]:
    """Keep the first and last ``most // 2`` tokens of a prompt that has more, and say what was cut.

    The query part stays whole, so the document's second half shrinks by the query's tokens. A cut through a character
    takes the whole character out, and where the kept text has more tokens than before (both ends meet anew), the first
    half gives up the surplus.
    """
    document, query = list(tokens.encode(prompt.document)), list(tokens.encode(prompt.query))
    total = len(document) + len(query)
    if total <= most:
        return prompt, {"tokens": total, "cut_tokens": 0}
    front, back = most // 2, most // 2 - len(query)
    if back < 0:
        raise EvalError(f"the question alone has {len(query)} tokens, half of the {most} that fit is less")
    head, tail = document[:front], document[len(document) - back :]
    head, tail = _whole_end(tokens, head), _whole_start(tokens, tail)
    text = tokens.decode(head + tail)
    while (surplus := tokens.count(text) + len(query) - most) > 0 and head:
        head = _whole_end(tokens, head[:-surplus])
        text = tokens.decode(head + tail)
    kept = len(head) + len(tail) + len(query)
    return PromptText(text, prompt.query, prompt.embedded), {"tokens": kept, "cut_tokens": total - kept}


BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer of bytes decodes a part of a character to. A character has at most four bytes, so tokens."""


def _whole_end(tokens: Tokens, ids: list[int]) -> list[int]:
    """``ids`` without the tokens at their end that hold a part of a character."""
    ends = [ids[: len(ids) - n] for n in range(4)]
    return next((end for end in ends if not tokens.decode(end[-8:]).endswith(BROKEN)), ids)


def _whole_start(tokens: Tokens, ids: list[int]) -> list[int]:
    """``ids`` without the tokens at their start that hold a part of a character."""
    return next((ids[n:] for n in range(4) if not tokens.decode(ids[n : n + 8]).startswith(BROKEN)), ids)

"""A tokenizer's own chat template, rendered once with marks for document and question and cut at them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from apb_jax.errors import UserError
from apb_jax.prompt.frame import Frame, Span
from apb_jax.prompt.pieces import control_tokens
from apb_jax.prompt.style import BLANK_LINE, OWN, PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
_PADDINGS = (" \n", "\n ")
_DOCUMENT, _QUESTION, _SYSTEM, _ANSWER = (
    f'{word} <"&">\' {word}' for word in ("D0cument", "Qu3stion", "Syst3m", "R3ply")
)
"""Marks: what a template that escapes, folds or cuts its content would change."""


def chat_frame(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> Frame:
    """The prompt that ``apply_chat_template`` gives for one user message, as a frame.

    Raises:
        UserError: no template; one that fails, refuses the system text, or changes what it is given.
    """
    if not tokenizer.chat_template:
        raise UserError("--template model: the tokenizer has no chat template; nearest legal choice: --template none")
    check_variables(tokenizer, style.template_args)
    separator = BLANK_LINE if style.separator is None else style.separator
    content = _DOCUMENT + separator + _QUESTION
    system: Messages = [] if style.system is None else [{"role": "system", "content": _SYSTEM}]

    def render(*turns: tuple[str, str], prompt: bool = True) -> str:
        messages = system + [{"role": role, "content": text} for role, text in turns]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **style.template_args
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            line = " ".join(str(error).split())[:200]
            advice = "with a system message; drop --system" if system else "; name another one (--template)"
            raise UserError(f"the model's chat template refuses ({line}) {advice}".replace(" ;", ";")) from error
        return str(text)

    text = render(("user", content))
    if any(text.count(part) != 1 for part in (_DOCUMENT, _QUESTION, content)):
        raise UserError("the model's chat template changes, drops or repeats a user's text; name another (--template)")
    opening, closing = text.split(content)
    if system and _SYSTEM not in text:
        raise UserError("the model's chat template drops the text of --system; drop --system")
    kept = {trims(opening, content, closing, pad, render) for pad in _PADDINGS}
    found = kept.pop()
    if kept or found is None:
        raise UserError("the model's chat template rewrites whitespace around a user's text; name another (--template)")
    return Frame(
        name=OWN,
        opening=spans(opening, style.system),
        closing=spans(closing, style.system),
        separator=separator,
        stop=end_of_turn(tokenizer, render, content),
        trims=found,
    )


def trims(
    opening: str, content: str, closing: str, padding: str, render: Callable[..., str]
) -> tuple[bool, bool] | None:
    """Whether the template drops whitespace left and right of a user's text; None: it does something else with it."""
    padded = render(("user", padding + content + padding))
    for left in ("", padding):
        for right in ("", padding):
            if padded == opening + left + content + right + closing:
                return not left, not right
    return None


def check_variables(tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
    """Refuse template variables that the template does not read: they would do nothing."""
    source = str(tokenizer.chat_template)
    words = set(re.findall(r"[A-Za-z_]\w*", source))
    for name in names:
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            hint = f"did you mean {near[0]}?" if near else "drop it"
            raise UserError(f"--template-arg {name}: the model's chat template has no such variable; {hint}")


def spans(text: str, system: str | None) -> tuple[Span, ...]:
    """Template text with the system text in its place, which is the user's and takes the spaces in front of it."""
    first, *others = text.split(_SYSTEM)
    out = [Span(first, True)]
    for piece in others:
        before = out[-1].text
        kept = before.rstrip(" ")
        out[-1] = Span(kept, True)
        out += [Span(before[len(kept) :] + (system or ""), False), Span(piece, True)]
    return tuple(span for span in out if span.text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, render: Callable[..., str], content: str) -> tuple[str, ...]:
    """The special token that the template puts behind an answer; none where it puts none or knows no answers."""
    try:
        text = render(("user", content), ("assistant", _ANSWER), prompt=False)
    except UserError:
        return ()  # a template for prompts alone: the tokenizer's and the model's own stop ids remain
    behind = text.partition(_ANSWER)[2].lstrip()
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return tuple(token for token in longest_first if behind.startswith(token))[:1]

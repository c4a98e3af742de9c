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
_PADDING = " \n\t"
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
    padded = render(("user", _PADDING + content + _PADDING))
    kept = {
        opening + left + content + right + closing: (not left, not right)
        for left in ("", _PADDING)
        for right in ("", _PADDING)
    }
    if padded not in kept:
        raise UserError("the model's chat template rewrites whitespace around a user's text; name another (--template)")
    return Frame(
        name=OWN,
        opening=spans(opening, style.system),
        closing=spans(closing, style.system),
        separator=separator,
        stop=end_of_turn(tokenizer, render, content),
        trims=kept[padded],
    )


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
    """Template text with the system text in its place, which is the user's."""
    out: list[Span] = []
    for index, piece in enumerate(text.split(_SYSTEM)):
        if index:
            out.append(Span(system or "", False))
        if piece:
            out.append(Span(piece, True))
    return tuple(out)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, render: Callable[..., str], content: str) -> tuple[str, ...]:
    """The special token that the template puts behind an answer; none where it puts none or knows no answers."""
    try:
        text = render(("user", content), ("assistant", _ANSWER), prompt=False)
    except UserError:
        return ()  # a template for prompts alone: the tokenizer's and the model's own stop ids remain
    behind = text.partition(_ANSWER)[2].lstrip()
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return tuple(token for token in longest_first if behind.startswith(token))[:1]

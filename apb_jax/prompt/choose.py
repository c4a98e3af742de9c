"""Which frame a prompt gets: by name; else the tokenizer's own chat template, a preset's published one, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apb_jax.errors import UserError
from apb_jax.presets import TEMPLATES, template_of
from apb_jax.prompt.chat import chat_frame
from apb_jax.prompt.frame import Frame, Span
from apb_jax.prompt.style import BLANK_LINE, NONE, OWN, PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_frame(tokenizer: PreTrainedTokenizerBase, model: str, style: PromptStyle) -> Frame:
    """The frame of a style: by its name; else the tokenizer's own, the preset's published one, or none.

    Args:
        model: the model's preset name; any other name stands for no preset.
    """
    name = style.template
    if name is None:
        published = template_of(model)
        name = OWN if tokenizer.chat_template else NONE if published in (None, "base") else published
    if name == OWN:
        return chat_frame(tokenizer, style)
    if name != NONE and name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; there are: {', '.join((OWN, *TEMPLATES, NONE))}")
    for flag, value in (("--system", style.system), ("--template-arg", style.template_args)):
        if value:
            raise UserError(
                f"{flag} is for a model's own chat template, and the template here is {name!r}; drop {flag}"
            )
    if name == NONE:
        separator = BLANK_LINE if style.separator is None else style.separator
        note = None if style.template else "the tokenizer has no chat template: document and question are plain text"
        return Frame(NONE, separator=separator, begins=True, note=note)
    row = TEMPLATES[name]
    return Frame(
        name=name,
        opening=(Span(row.before, True),) if row.before else (),
        closing=(Span(row.after, True),) if row.after else (),
        ask=row.ask,
        separator=style.separator or "",
        stop=row.stop,
        begins=not row.before,
        joined=False,
        embed_closing=row.embed_after,
    )

"""What stands around document and question, as text: a published template, none, or the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A piece of text and whether its special tokens are meant: a template's are, a user's are not."""

    text: str
    control: bool


@dataclass(frozen=True)
class Frame:
    """``opening document separator ask question closing``: the whole prompt, in this order."""

    name: str
    opening: tuple[Span, ...] = ()
    closing: tuple[Span, ...] = ()
    ask: str = ""
    """Template text in front of the question, embedded in APB's anchor with it."""
    separator: str = ""
    stop: tuple[str, ...] = ()
    """Tokens that end an answer, as text."""
    trims: tuple[bool, bool] = (False, False)
    """Whether whitespace left of the document and right of the question is dropped."""
    begins: bool = False
    """Whether the tokenizer's own begin tokens stand in front."""
    joined: bool = True
    """Whether parts are tokenised as they stand inside one text; the published scripts take each as a text alone."""
    embed_closing: bool = False
    """Whether APB's anchor holds the question with the closing."""
    note: str | None = None
    """What the user should know about it."""

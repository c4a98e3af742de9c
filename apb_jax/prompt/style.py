"""How a request becomes a prompt, as the user asks for it. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apb_jax.errors import UserError
from apb_jax.typed import check_types

OWN = "model"
"""The name of a tokenizer's own chat template."""
NONE = "none"
"""The name of no template at all: begin tokens as the tokenizer adds them, document, separator, question."""
BLANK_LINE = "\n\n"
_RESERVED = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding "
    "return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools truncation".split()
)
"""Arguments of ``apply_chat_template`` and names it gives to a template itself."""


@dataclass(frozen=True)
class PromptStyle:
    """Template, system text, separator and template variables.

    Raises:
        UserError: for an empty system text and for template variables that are not the user's to set.
    """

    template: str | None = None
    """"model" (the tokenizer's own), "none", or a published one (``presets.TEMPLATES``); None: the model decides."""
    system: str | None = None
    """A system message for the model's own template, without the whitespace around it."""
    separator: str | None = None
    """Between document and question; None: a blank line, and nothing under a published template."""
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the model's own template, such as ``enable_thinking``."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.system is not None:
            if not self.system.strip():
                raise UserError(f"--system is {self.system!r}; it needs at least one word")
            object.__setattr__(self, "system", self.system.strip())
        for name in self.template_args:
            if name in _RESERVED:
                raise UserError(f"--template-arg {name} is set by the prompt itself; drop it")


def parse_template_arg(text: str) -> tuple[str, Any]:
    """``"enable_thinking=false"`` as ("enable_thinking", False): true, false, numbers; anything else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(
            f"--template-arg {text!r} is not of the form NAME=VALUE, for example --template-arg enable_thinking=false"
        )
    words = {"true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    if re.fullmatch(r"[+-]?\d+", value):
        return name, int(value)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?", value):
        return name, float(value)
    return name, value


def parse_separator(text: str) -> str:
    r"""A separator from a command line: ``\n``, ``\t`` and ``\\`` are a newline, a tab and a backslash."""
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\(.)", lambda found: escapes.get(found[1], found[0]), text)

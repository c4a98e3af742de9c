"""Text to token ids and back: chat template, and the split of a prompt into document, query and embedded query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.errors import UserError
from apb_jax.presets import TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | list[int] | np.ndarray


def find_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the template whose marker token the tokenizer knows; "base" (no template) otherwise."""
    vocabulary = tokenizer.get_vocab()
    for name, template in TEMPLATES.items():
        if template.marker and template.marker in vocabulary:
            return name
    return "base"


@dataclass(frozen=True)
class PromptCodec:
    """A tokenizer and a chat template. The document carries the template's opening, the query its closing.

    Document and query are tokenised apart, so that no merge crosses the border (as NVIDIA's Star-Attention does).
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template

    def encode(self, text: str) -> np.ndarray:
        """Token ids without special tokens of the tokenizer's own, int32."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.asarray(ids, np.int32)

    @property
    def opening(self) -> np.ndarray:
        """Ids in front of every document: the template's opening, or the tokenizer's own first token (bos)."""
        if self.template.before:
            return self.encode(self.template.before)
        bos = self.tokenizer.bos_token_id
        return np.asarray([] if bos is None else [bos], np.int32)

    @property
    def query_at(self) -> int:
        """Where APB embeds the query: right behind the opening."""
        return len(self.opening)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the template's stop words that the tokenizer knows, and its eos."""
        vocabulary = self.tokenizer.get_vocab()
        found = [vocabulary[word] for word in self.template.stop if word in vocabulary]
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(found))

    def prompt(self, document: Text, query: Text, embedded_query: Text | None = None) -> Prompt:
        """Ids of one request. Given ids are taken as they are (no template)."""
        if isinstance(document, str):
            document = np.concatenate([self.opening, self.encode(document)])
        if isinstance(query, str):
            clean = self.encode(self.template.ask + query)
            full = np.concatenate([clean, self.encode(self.template.after)])
        else:
            clean = full = np.asarray(query, np.int32)
        embedded: Text = full if self.template.embed_after else clean
        if embedded_query is not None:
            embedded = self.encode(embedded_query) if isinstance(embedded_query, str) else embedded_query
        return make_prompt(document, full, embedded)

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def make_prompt(document: Text, query: Text, embedded_query: Text | None = None) -> Prompt:
    """A Prompt of token ids, checked: neither document nor query may be empty."""
    if isinstance(document, str) or isinstance(query, str) or isinstance(embedded_query, str):
        raise UserError("this model has no tokenizer: give document and query as token ids")
    arrays = [np.asarray(x, np.int32).reshape(-1) for x in (document, query)]
    for name, ids in zip(("document", "query"), arrays, strict=True):
        if not len(ids):
            raise UserError(f"the {name} has 0 tokens; it needs at least 1")
    embedded = arrays[1] if embedded_query is None else np.asarray(embedded_query, np.int32).reshape(-1)
    return Prompt(arrays[0], arrays[1], embedded)

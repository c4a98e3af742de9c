"""A tokenizer and a frame: requests to token ids, split into document, query and embedded query, and ids to text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.prompt.choose import choose_frame
from apb_jax.prompt.frame import Frame, Span
from apb_jax.prompt.ids import Text, make_prompt
from apb_jax.prompt.pieces import Pieces, begin_ids
from apb_jax.prompt.style import PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_codec(tokenizer: PreTrainedTokenizerBase, model: str, style: PromptStyle | None = None) -> PromptCodec:
    """The codec of a model (by its preset name) under a style; see ``choose_frame``."""
    return PromptCodec(tokenizer, choose_frame(tokenizer, model, style or PromptStyle()))


@dataclass(frozen=True)
class PromptCodec:
    """A tokenizer and a frame. The document carries the opening, the query its closing.

    Document and query are tokenised apart, so that no merge crosses the border (as NVIDIA's Star-Attention does);
    docs/numerics.md says where that differs from tokenising the whole.
    """

    tokenizer: PreTrainedTokenizerBase
    frame: Frame

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    @property
    def note(self) -> str | None:
        """What the user should know about the template."""
        return self.frame.note

    @cached_property
    def _lead(self) -> str:
        """Spaces at the end of the opening: they are the document's, for a word's token holds the space before it."""
        if not self.frame.joined or not self.frame.opening:
            return ""
        last = self.frame.opening[-1]
        return last.text[len(last.text.rstrip(" ")) :] if last.control else ""

    @cached_property
    def opening(self) -> np.ndarray:
        """Ids in front of every document: the template's opening, or what the tokenizer itself begins with."""
        front = np.asarray(begin_ids(self.tokenizer) if self.frame.begins else [], np.int32)
        spans = list(self.frame.opening)
        if self._lead:
            spans[-1] = Span(spans[-1].text.removesuffix(self._lead), True)
        return np.concatenate([front, self._template(spans, start=True)])

    @cached_property
    def closing(self) -> np.ndarray:
        """Ids behind every question, up to where the answer begins."""
        return self._template(self.frame.closing, start=not self.frame.joined)

    @property
    def query_at(self) -> int:
        """Where APB embeds the query: right behind the opening."""
        return len(self.opening)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the frame's stop words that the tokenizer knows, and its eos."""
        vocabulary = self.tokenizer.get_vocab()
        found = [vocabulary[word] for word in self.frame.stop if word in vocabulary]
        if self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(found))

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 of a user's text inside the prompt: what spells a control token is text."""
        return self._pieces.encode(text, control=False, start=not self.frame.joined)

    def document(self, text: str) -> np.ndarray:
        """Ids int32 of the opening and a document."""
        alone = not self.frame.joined or not len(self.opening)
        body = self._pieces.encode(self._lead + text, control=False, start=alone)
        if self.frame.joined and text.endswith("\n"):
            # GPT-2's splitting looks ahead: line breaks before a word are cut otherwise than those that end a text.
            word = self._pieces.encode("a", control=False, start=False)
            ahead = self._pieces.encode(self._lead + text + "a", control=False, start=alone)
            if len(word) == 1 and ahead[-1] == word[0]:
                body = ahead[:-1]
        return np.concatenate([self.opening, body])

    def prompt(self, document: Text, query: Text, embedded_query: Text | None = None) -> Prompt:
        """Ids of one request. Given ids are taken as they are (no template).

        Raises:
            UserError: an empty part, ids that are no ids, text that is no Unicode.
        """
        frame = self.frame
        if isinstance(document, str):
            if frame.trims[0]:
                document = document.lstrip()
            # A document of nothing but whitespace leaves the separator to be trimmed as well.
            separator = frame.separator if document or not frame.trims[0] else frame.separator.lstrip()
            document = self.document(document + separator) if document or separator else self.opening
        if isinstance(query, str):
            clean = self.encode(frame.ask + (query.rstrip() if frame.trims[1] else query))
            full = np.concatenate([clean, self.closing])
        else:
            clean = full = query  # type: ignore[assignment]
        embedded: Text = full if frame.embed_closing else clean
        if embedded_query is not None:
            embedded = self.encode(embedded_query) if isinstance(embedded_query, str) else embedded_query
        return make_prompt(document, full, embedded)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens and as it was written (spaces before full stops stay)."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _template(self, spans: Iterable[Span], start: bool) -> np.ndarray:
        """Ids of consecutive spans; ``start``: whether they begin a text."""
        pieces = self._pieces
        parts = [np.zeros(0, np.int32)]
        for index, span in enumerate(spans):
            # Behind a control token no text begins, even where the tokenizer would put a space there.
            first = start and index == 0 and not (self.frame.joined and pieces.begins_with_control(span.text))
            parts.append(pieces.encode(span.text, control=span.control, start=first))
        return np.concatenate(parts)

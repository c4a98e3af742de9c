"""Requests to token ids: which part is the document, and the rest as a query behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.prompt.pieces import begin_ids
from apb_jax.serve.documents import LEAST_TOKENS, Document, Library, split_message
from apb_jax.serve.refusal import wrong
from apb_jax.serve.requests import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Wording:
    """The engine's codec and the documents known so far.

    The rule for a chat without ``document_id``: the document is the longest known one that the first user message
    starts with; else that message up to its last blank line; else, where other user messages follow, the whole of it.
    Instructions and the conversation stand behind the document, in the query, so that they do not change its session.
    """

    engine: Engine
    library: Library
    find: Callable[[str], Document]
    """A document by its id; refuses what is not there or does not load."""

    def __post_init__(self) -> None:
        if self.engine.codec is None:
            raise UserError(f"{self.engine.model.name} has no tokenizer; a server needs one")

    def document(self, text: str, name: str = "", given: bool = False) -> Document:
        """A text as a document; nothing is remembered yet."""
        ids = self.engine.prompt(text, "?").document
        return Document(text, np.asarray(ids, np.int32), name, given)

    def chat(self, request: ChatRequest) -> tuple[Document, np.ndarray]:
        """(document, query ids) of a conversation; the document is remembered where it is worth a session."""
        turns = list(request.turns)
        if request.document_id is not None:
            return self.find(request.document_id), self.query(request.instructions, turns)
        first, answer = turns[0]
        document = self.library.at_start(first)
        if document is not None:
            rest = first[len(document.text) :].strip()
        else:
            text, rest = split_message(first)
            if not text and len(turns) > 1:
                text, rest = first, ""
            document = self.worth_keeping(text)
        if document is None:
            return self.nothing(), self.query(request.instructions, turns)
        turns = [(rest, answer), *turns[1:]] if rest or answer else turns[1:]
        return document, self.query(request.instructions, turns)

    def worth_keeping(self, text: str) -> Document | None:
        """A text as a document, remembered, where it has at least ``LEAST_TOKENS``."""
        if not text.strip():
            return None
        document = self.document(text)
        return self.library.add(document) if len(document.ids) >= LEAST_TOKENS else None

    def nothing(self) -> Document:
        """The document of requests without one: what stands in front of any (the template's opening)."""
        assert self.engine.codec is not None
        opening = np.asarray(self.engine.codec.opening, np.int32)
        if not len(opening):
            opening = np.asarray(self.engine.codec.encode("\n"), np.int32)
        return Document("", opening)

    def query(self, instructions: str, turns: list[tuple[str, str | None]]) -> np.ndarray:
        """Ids of instructions and conversation, up to where the answer begins."""
        parts: list[np.ndarray] = []
        for index, (text, answer) in enumerate(turns):
            if index == 0 and instructions:
                text = f"{instructions}\n\n{text}" if text else instructions
            if index:
                parts.append(self.user_header)
            if text.strip():
                parts.append(self.engine.prompt([0], text).query)
            if answer is not None:
                assert self.engine.codec is not None
                parts += [np.asarray(self.engine.codec.encode(answer), np.int32), self.end_of_turn]
        return np.concatenate(parts).astype(np.int32)

    @property
    def user_header(self) -> np.ndarray:
        """What opens a user's turn: the opening behind its last begin token or end of turn; without a template none."""
        return self._opening_cut()[1]

    @property
    def end_of_turn(self) -> np.ndarray:
        """What ends an answer inside the conversation; empty without a template."""
        end, header = self._opening_cut()
        return end if len(header) else header

    def _opening_cut(self) -> tuple[np.ndarray, np.ndarray]:
        codec = self.engine.codec
        assert codec is not None
        opening, tokenizer = np.asarray(codec.opening, np.int32), codec.tokenizer
        borders = [i for i, t in enumerate(opening) if t in codec.stop_ids or t == tokenizer.bos_token_id]
        header = opening[borders[-1] + 1 :] if borders else opening
        stops = [t for t in opening if t in codec.stop_ids] or [tokenizer.eos_token_id]
        return np.asarray([t for t in stops[-1:] if t is not None], np.int32), header

    def completion(self, request: CompletionRequest) -> tuple[Document, np.ndarray]:
        """(document, query ids) of a prompt that is taken as it stands: no template, control tokens mean themselves.

        The document ends behind the last blank line of a text, and before the last id of a list of ids.
        """
        codec = self.engine.codec
        assert codec is not None
        if isinstance(request.prompt, str):
            text, _ = split_message(request.prompt)
            edge = len(text) + 2 if text else 0
            encode = partial(codec.tokenizer.encode, add_special_tokens=False, verbose=False)
            head = np.asarray([*begin_ids(codec.tokenizer), *encode(request.prompt[:edge])], np.int32)
            tail = np.asarray(encode(request.prompt[edge:]), np.int32)
        else:
            text, ids = "", np.asarray(request.prompt, np.int32)
            if ids.max() >= self.engine.model.config.vocab_size:
                raise wrong("prompt", f"token ids lie in 0..{self.engine.model.config.vocab_size - 1}")
            head, tail = ids[:-1], ids[-1:]
        if len(head) < LEAST_TOKENS or not len(tail):
            whole = np.concatenate([head, tail])
            if len(whole) < 2:
                raise wrong("prompt", f"prompt has {len(whole)} token; it needs at least 2")
            head, tail = whole[:1], whole[1:]
        return Document("", head), tail

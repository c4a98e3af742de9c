"""Documents by id, and which document a message starts with."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from apb_jax.serve.refusal import Refusal, not_found

LEAST_TOKENS = 64
"""A shorter text in front of a question is part of the question: its prefill costs less than its place."""
MOST_REST = 8192
"""Characters: a message that starts with a known document and goes on longer is another document."""
SEEN_BYTES = 1 << 29
"""Text that is remembered of documents seen in messages; of the one seen longest ago it is forgotten first."""
GIVEN_BYTES = 1 << 32
"""Text of documents that clients gave; more is refused until some are deleted."""


@dataclass(frozen=True)
class Document:
    """A text and its token ids, the template's opening included. The id is made from them: equal texts share one."""

    text: str = field(repr=False)
    ids: np.ndarray = field(repr=False)
    name: str = ""
    given: bool = False
    """Whether a client gave it to keep (``POST /v1/documents``), rather than in front of a question."""
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def key(self) -> str:
        """Under which its session is stored: a hash of the ids, 64 hexadecimal digits."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, np.int32).tobytes()).hexdigest()

    @property
    def id(self) -> str:
        """What clients call it."""
        return f"doc-{self.key[:24]}"


class Library:
    """The documents that the server knows. Called from several threads."""

    def __init__(self) -> None:
        self._documents: OrderedDict[str, Document] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, document: Document) -> Document:
        """Remember a document; the known one where it is known, given from now on where it was only seen."""
        name = document.id
        with self._lock:
            known = self._documents.get(name)
            if known is not None:
                document = replace(document, created=known.created) if document.given and not known.given else known
            elif document.given and self._bytes(True) + len(document.text) > GIVEN_BYTES:
                raise Refusal(413, f"documents of {GIVEN_BYTES} characters are kept already; delete some", code="full")
            self._documents[name] = document
            self._documents.move_to_end(name)
            while self._bytes(False) > SEEN_BYTES:
                self._documents.pop(next(key for key, kept in self._documents.items() if not kept.given))
        return document

    def _bytes(self, given: bool) -> int:
        return sum(len(kept.text) for kept in self._documents.values() if kept.given == given)

    def find(self, name: str) -> Document:
        """The document of this id; 404 where there is none."""
        with self._lock:
            if name not in self._documents:
                raise not_found("no document of this id; see GET /v1/documents", "document_id")
            return self._documents[name]

    def remove(self, name: str) -> Document:
        """Forget a document; 404 where there is none."""
        document = self.find(name)
        with self._lock:
            self._documents.pop(name, None)
        return document

    def list(self) -> list[Document]:
        """All, the one used longest ago first."""
        with self._lock:
            return list(self._documents.values())

    def at_start(self, message: str) -> Document | None:
        """The longest known document that a message starts with, at the border of a word and with a question behind."""
        with self._lock:
            found = [
                kept
                for kept in self._documents.values()
                if kept.text
                and message.startswith(kept.text)
                and 0 < len(message) - len(kept.text) <= MOST_REST
                and (kept.text[-1].isspace() or message[len(kept.text)].isspace())
                and message[len(kept.text) :].strip()
            ]
        return max(found, key=lambda kept: len(kept.text), default=None)


def split_message(message: str) -> tuple[str, str]:
    """(document, question): cut at the last blank line; ("", message) where there is none."""
    document, _, question = message.rstrip().rpartition("\n\n")
    return (document, question) if document.strip() else ("", message)

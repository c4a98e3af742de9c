"""Where sessions live between questions: the protocol of a store, and the one in device memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax

from apb_jax.serve.documents import Document
from apb_jax.session import Session

Loading = Generator[tuple[int, int], None, Session]
"""A session on its way: yields (layers done, of how many), returns it."""


class Gone(Exception):
    """A session went before it was loaded: its document is prefilled again."""


@dataclass(frozen=True)
class Stored:
    """What is known of a session without taking it out."""

    key: str
    bytes: int
    where: str
    """"device" or "disk"."""
    used: float
    """Unix time of the last use."""
    method: str
    prefill_s: float
    layout: tuple[dict[str, int], ...] = ()
    """For every shard, the keys its rows see by where they come from (``AttentionMethod.visible_keys``)."""
    notes: tuple[str, ...] = ()
    name: str = ""
    """Its document's, where the session does not load."""
    problem: str | None = None
    """Why it does not load."""


class SessionStore(Protocol):
    """Sessions by the key of their document. Called from several threads."""

    def get(self, key: str) -> Session | None:
        """The session in device memory, used now; None where there is none."""

    def loading(self, key: str) -> Loading | None:
        """The session from where else it is kept; None where it is nowhere. Refusal 409 where it does not load.

        The generator raises ``Gone`` where the session goes before it is there.
        """

    def put(self, document: Document, session: Session) -> None:
        """Keep a session; others may go for it."""

    def list(self) -> list[Stored]:
        """All that are kept, those on disk first, each the one used longest ago first; one may be in both places."""

    def delete(self, key: str) -> bool:
        """Forget one; whether there was one."""

    def make_room(self, count: int) -> None:
        """Let go of sessions in device memory until ``count`` more bytes are within the store's limit."""

    def let_go(self) -> bool:
        """Let go of the session in device memory that was used longest ago; False where there is none."""

    def known(self) -> Sequence[Document]:
        """Documents of kept sessions that an earlier server left."""

    def close(self) -> None:
        """Finish what is being written."""


def session_bytes(session: Session) -> int:
    """Bytes that a session holds on all devices together."""
    arrays = jax.tree.leaves((session.cache, session.lengths))
    return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


class DeviceStore:
    """Sessions in device memory, at most ``limit`` bytes of them; the one used longest ago goes first.

    A session larger than the limit answers those who wait for it and is not kept. One that is being asked lives on
    until its answers are done, also where it was let go.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[str, tuple[Session, Stored]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Session | None:
        with self._lock:
            if key not in self._kept:
                return None
            session, stored = self._kept[key]
            self._kept[key] = session, replace(stored, used=time.time())
            self._kept.move_to_end(key)
            return session

    def loading(self, key: str) -> Loading | None:
        return None

    def put(self, document: Document, session: Session) -> None:
        size, key = session_bytes(session), document.key
        keys = tuple(session.method.visible_keys(session.layout, shard) for shard in range(session.layout.shards))
        stored = Stored(
            key, size, "device", time.time(), session.method.name, session.prefill_s, keys, session.notes
        )  # fmt: skip
        with self._lock:
            self._kept.pop(key, None)
            if size <= self.limit:
                self._shrink(self.limit - size)
                self._kept[key] = session, stored

    def list(self) -> list[Stored]:
        with self._lock:
            return [stored for _, stored in self._kept.values()]

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._kept.pop(key, None) is not None

    def make_room(self, count: int) -> None:
        with self._lock:
            self._shrink(max(0, self.limit - count))

    def let_go(self) -> bool:
        with self._lock:
            return bool(self._kept) and bool(self._kept.popitem(last=False))

    def known(self) -> Sequence[Document]:
        return []

    def close(self) -> None:
        """Nothing is being written."""

    def _shrink(self, limit: int) -> None:
        while self._kept and sum(stored.bytes for _, stored in self._kept.values()) > limit:
            self._kept.popitem(last=False)

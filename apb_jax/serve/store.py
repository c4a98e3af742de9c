"""Where sessions live between questions: the protocol of a store, and the one in device memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import jax

from apb_jax.engine import Engine
from apb_jax.session import Session


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
    layout: tuple[dict[str, int], ...]
    """For every shard, the keys its rows see by where they come from (``AttentionMethod.visible_keys``)."""
    notes: tuple[str, ...] = ()


class SessionStore(Protocol):
    """Sessions by the key of their document. Called from several threads."""

    def get(self, key: str) -> Session | None:
        """The session, used now; None where there is none."""

    def put(self, key: str, session: Session) -> None:
        """Keep a session; others may go for it."""

    def list(self) -> list[Stored]:
        """All that are kept, the one used longest ago first."""

    def delete(self, key: str) -> None:
        """Forget one; nothing happens where there is none."""

    def make_room(self, count: int) -> None:
        """Let go of sessions until ``count`` more bytes fit, as far as there are any."""


def session_bytes(session: Session) -> int:
    """Bytes that a session holds on all devices together."""
    arrays = jax.tree.leaves((session.cache, session.lengths))
    return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


def estimated_bytes(engine: Engine, tokens: int) -> int:
    """Bytes of K and V of a document, without padding: what is made room for before the prefill."""
    config = engine.model.config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return int(tokens * row * engine.model.dtype.itemsize)


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
            self._kept[key] = session, Stored(**(vars(stored) | {"used": time.time()}))
            self._kept.move_to_end(key)
            return session

    def put(self, key: str, session: Session) -> None:
        size = session_bytes(session)
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

    def delete(self, key: str) -> None:
        with self._lock:
            self._kept.pop(key, None)

    def make_room(self, count: int) -> None:
        with self._lock:
            self._shrink(max(0, self.limit - count))

    def _shrink(self, limit: int) -> None:
        while self._kept and sum(stored.bytes for _, stored in self._kept.values()) > limit:
            self._kept.popitem(last=False)

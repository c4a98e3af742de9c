"""The engine's thread: one unit of work at a time, so that prefills and answers take turns and can be cancelled."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.serve.answering import Event, Finished, Progress
from apb_jax.serve.documents import Document
from apb_jax.serve.memory import MemoryPlan
from apb_jax.serve.metrics import Metrics
from apb_jax.serve.refusal import Refusal, broken, busy, wrong
from apb_jax.serve.store import Gone, SessionStore
from apb_jax.session import Session

log = logging.getLogger("apb_jax.serve")
Units = Callable[[Session, int], Iterator[list[Event]]]
"""(session, cached tokens) -> units of work, each with the events that it made."""
PLACEHOLDER = np.zeros(1, np.int32)
"""Stands for the question in a prefill that does not know it; methods that would read it are refused at start."""


@dataclass(frozen=True)
class Limits:
    """How much is taken on at a time."""

    queue: int = 64
    """Requests that wait; one more is refused."""
    running: int = 8
    """Answers that are decoded in turn."""


class Ticket:
    """A request on its way through the engine's thread. Events come out on the loop that made it."""

    def __init__(self, document: Document, units: Units | None, prompt_tokens: int) -> None:
        """``units`` None: the prefill alone is wanted."""
        self.document, self.units, self.prompt_tokens = document, units, prompt_tokens
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | Refusal] = asyncio.Queue()
        self.cancelled = self.done = False
        self.session: Session | None = None
        self.cached_tokens = 0
        self.work: Iterator[list[Event]] | None = None

    def cancel(self) -> None:
        """The client is gone: the engine's thread drops the ticket before its next unit."""
        self.cancelled = True

    def post(self, event: Event | Refusal) -> None:
        """Hand an event to the loop; where that is closed nobody waits any more."""
        self.done = self.done or isinstance(event, Finished | Refusal)
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            self.cancel()


@dataclass
class Prefilling:
    """A prefill and all who wait for it."""

    document: Document
    waiters: list[Ticket]
    steps: Generator[tuple[int, int], None, Session] | None = None
    loaded: bool = False
    """Whether the session comes from the store instead: nothing is computed."""
    started: float = 0.0
    compiled_s: float = 0.0
    """The engine's seconds of compilation before it: those since then say nothing about the layers to come."""
    progress: Progress | None = None


@dataclass
class Worker:
    """Takes tickets in order. Each turn runs one layer group of one prefill, then one unit of every running answer."""

    engine: Engine
    store: SessionStore
    metrics: Metrics
    memory: MemoryPlan
    limits: Limits = field(default_factory=Limits)
    prefills: OrderedDict[str, Prefilling] = field(default_factory=OrderedDict)
    """By document key, in order of arrival, sessions that are loaded before all others; the first one is running."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why the last prefill of a document failed, by its key."""

    def __post_init__(self) -> None:
        self._inbox: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._wake = threading.Condition()
        self._stopping = False

    # ---- from other threads ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Tickets that are not being answered yet."""
        prefills = list(self.prefills.values())
        return len(self._inbox) + len(self._ready) + sum(len(prefill.waiters) for prefill in prefills)

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._running)

    def submit(self, ticket: Ticket) -> None:
        """Take a ticket on; 429 where the queue is full, 503 where the server is going down."""
        with self._wake:
            if self._stopping:
                raise broken("the server is going down", 503)
            if self.waiting >= self.limits.queue:
                raise busy(self.waiting)
            self._inbox.append(ticket)
            self._wake.notify()

    def stop(self) -> None:
        """End after the unit that is running; whatever waits is refused."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # ---- the engine's thread ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until ``stop``."""
        while self._take():
            self._drop_cancelled()
            self._prefill_unit()
            for ticket in [*self._running]:
                self._answer_unit(ticket)
            while self._ready and len(self._running) < self.limits.running:
                self._running.append(self._ready.popleft())
        refusal = broken("the server is going down", 503)
        waiting = [ticket for prefill in self.prefills.values() for ticket in prefill.waiters]
        for ticket in [*self._inbox, *self._ready, *self._running, *waiting]:
            ticket.post(refusal)
        for key in list(self.prefills):
            self._end_prefill(key)
        self._inbox.clear()
        self._ready.clear()
        self._running.clear()

    def _take(self) -> bool:
        """Sort what has arrived; sleeps where there is nothing to do. False at the end."""
        with self._wake:
            while not (self._inbox or self.prefills or self._ready or self._running or self._stopping):
                self._wake.wait()
            arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
            if self._stopping:
                self._inbox.extend(arrived)
                return False
        for ticket in arrived:
            if ticket.cancelled:
                continue
            try:
                self._sort(ticket)
            except Exception as error:  # noqa: BLE001 - told and logged by refusal_of; the server goes on
                ticket.post(refusal_of(error, self.store))
        return True

    def _sort(self, ticket: Ticket) -> None:
        """To the answers where its session is there; else behind the prefill of the same document, or a new one."""
        key = ticket.document.key
        session = self.store.get(key)
        loading = None if session or key in self.prefills else self.store.loading(key)
        found = "hit" if session else "joined" if key in self.prefills else "disk" if loading else "miss"
        self.metrics.session(found)
        if session is not None:
            ticket.cached_tokens = len(ticket.document.ids)
            self._hand(ticket, session)
            return
        prefill = self.prefills.setdefault(key, Prefilling(ticket.document, [], loading, loading is not None))
        if loading:
            self.prefills.move_to_end(key, last=False)
        prefill.waiters.append(ticket)
        if prefill.progress:
            ticket.post(prefill.progress)

    def _hand(self, ticket: Ticket, session: Session) -> None:
        total = ticket.prompt_tokens
        done = len(ticket.document.ids)
        if ticket.units is None:
            ticket.post(Progress(total, ticket.cached_tokens, done, 0.0, 0.0))
            ticket.post(Finished("stop", 0, ticket.cached_tokens))
            return
        if ticket.cached_tokens:
            ticket.post(Progress(total, ticket.cached_tokens, done, 0.0, 0.0))
        ticket.session = session
        self._ready.append(ticket)

    def _drop_cancelled(self) -> None:
        for ticket in [ticket for ticket in self._running if ticket.cancelled]:
            self._running.remove(ticket)
            self._let_go(ticket)
            self.metrics.cancelled("answer")
        for ticket in [ticket for ticket in self._ready if ticket.cancelled]:
            self._ready.remove(ticket)
            self._let_go(ticket)
        for key, prefill in list(self.prefills.items()):
            prefill.waiters = [ticket for ticket in prefill.waiters if not ticket.cancelled]
            if not prefill.waiters:
                self._end_prefill(key)
                self.metrics.cancelled("prefill")

    @staticmethod
    def _let_go(ticket: Ticket) -> None:
        """Free what the ticket holds on the devices."""
        ticket.work, ticket.session, ticket.units = None, None, None

    def _end_prefill(self, key: str) -> list[Ticket]:
        prefill = self.prefills.pop(key)
        if prefill.steps is not None:
            prefill.steps.close()
        return prefill.waiters

    def _prefill_unit(self) -> None:
        """The next group of layers of the first prefill or load; a new one starts only where its answers can follow."""
        if not self.prefills:
            return
        key, prefill = next(iter(self.prefills.items()))
        started = time.perf_counter()
        try:
            if not prefill.started:
                if len(self._ready) >= self.limits.running:
                    return
                self.memory.admit(len(prefill.document.ids), self.store, loaded=prefill.loaded)
                if prefill.steps is None:
                    prompt = Prompt(prefill.document.ids, PLACEHOLDER, PLACEHOLDER)
                    prefill.steps = self.engine.prefill_steps([prompt])
                prefill.started, prefill.compiled_s = started, self.engine.programs.compile_s
            assert prefill.steps is not None
            done, layers = next(prefill.steps)
        except StopIteration as finished:
            self._prefilled(key, prefill, finished.value, started)
            return
        except Gone:
            prefill.steps, prefill.loaded, prefill.started = None, False, 0.0
            return
        except Exception as error:  # noqa: BLE001 - told and logged by refusal_of; the server goes on
            refusal = refusal_of(error, self.store)
            self.failures[key] = refusal.message
            for ticket in self._end_prefill(key):
                ticket.post(refusal)
            return
        self.metrics.prefill_seconds(time.perf_counter() - started, loaded=prefill.loaded)
        self._tell(prefill, done, layers)

    def _tell(self, prefill: Prefilling, done: int, layers: int) -> None:
        tokens = len(prefill.document.ids)
        ms = 1e3 * (time.perf_counter() - prefill.started)
        compile_ms = 1e3 * (self.engine.programs.compile_s - prefill.compiled_s)
        eta = max(0.0, ms - compile_ms) / done * (layers - done) if done else None
        for ticket in prefill.waiters:
            ticket.cached_tokens = tokens if prefill.loaded else 0
            ticket.post(Progress(ticket.prompt_tokens, ticket.cached_tokens, tokens * done // layers, ms, eta))
        prefill.progress = Progress(tokens, tokens if prefill.loaded else 0, tokens * done // layers, ms, eta)

    def _prefilled(self, key: str, prefill: Prefilling, session: Session, started: float) -> None:
        tokens = len(prefill.document.ids)
        self.metrics.prefill_seconds(time.perf_counter() - started, loaded=prefill.loaded)
        if not prefill.loaded:
            self.metrics.prefilled(tokens)
        self.failures.pop(key, None)
        try:
            self.store.put(prefill.document, session)
        except Exception:  # a store that fails costs the next question a prefill, not this one its answer
            log.exception("a session could not be stored")
        for ticket in self._end_prefill(key):
            ticket.cached_tokens = tokens if prefill.loaded else 0
            self._hand(ticket, session)

    def _answer_unit(self, ticket: Ticket) -> None:
        """The query phase or the next chunk of one answer."""
        started = time.perf_counter()
        try:
            if ticket.work is None:
                assert ticket.units is not None
                assert ticket.session is not None
                ticket.work = ticket.units(ticket.session, ticket.cached_tokens)
            events = next(ticket.work, None)
        except Exception as error:  # noqa: BLE001 - told and logged by refusal_of; the server goes on
            self._running.remove(ticket)
            self._let_go(ticket)
            ticket.post(refusal_of(error, self.store))
            return
        self.metrics.decode_seconds(time.perf_counter() - started)
        for event in events or ():
            if isinstance(event, Finished):
                self.metrics.answered(event.completion_tokens)
            ticket.post(event)
        if events is None or any(isinstance(event, Finished) for event in events):
            self._running.remove(ticket)
            self._let_go(ticket)


def refusal_of(error: Exception, store: SessionStore) -> Refusal:
    """What a client is told of an error in the engine's thread; a full device lets all its sessions go."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError):
        return wrong("messages", str(error))
    if "RESOURCE_EXHAUSTED" in str(error):
        while store.let_go():
            pass
        return broken("the devices ran out of memory; kept sessions were let go, try again", 503)
    log.error("a request failed", exc_info=error)
    return broken("the server failed on this request; its log says how")

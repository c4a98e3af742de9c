"""The server's parts in one place: the engine once it is there, its thread, the documents and what is told of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from apb_jax.engine import Engine
from apb_jax.serve.answering import Ask, answer
from apb_jax.serve.documents import Document, Library
from apb_jax.serve.memory import MemoryPlan
from apb_jax.serve.metrics import Metrics
from apb_jax.serve.refusal import Refusal, broken, too_long
from apb_jax.serve.requests import Defaults, Options
from apb_jax.serve.store import SessionStore, Stored
from apb_jax.serve.wording import Wording
from apb_jax.serve.worker import Limits, Ticket, Worker


@dataclass(frozen=True)
class Plan:
    """What a server is made with."""

    make_engine: Callable[[], Engine]
    make_store: Callable[[Engine], SessionStore]
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    memory_bytes: int | None = None
    """Of a device that may be used; None: what the devices say."""


@dataclass(frozen=True)
class Loaded:
    """What there is once the model is on the devices."""

    engine: Engine
    store: SessionStore
    worker: Worker
    wording: Wording


class Service:
    """Behind the routes. ``start`` loads the model in the engine's thread; until then ``loaded`` is a 503."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.metrics = Metrics()
        self.library = Library()
        self.words = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        """One thread for turning text into ids: a book takes longer than the loop may be held up."""
        self._loaded: Loaded | None = None
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def start(self, on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[], None] = lambda: None) -> None:
        """Begin to load; ``on_ready`` or ``on_failure`` is called from the engine's thread."""

        def work() -> None:
            try:
                self._loaded = self._load()
            except Exception as error:  # noqa: BLE001 - raised again where the server was started
                self.failure = error
                on_failure()
                return
            on_ready()
            self._loaded.worker.run()

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        self._thread.start()

    def _load(self) -> Loaded:
        engine = self.plan.make_engine()
        store = self.plan.make_store(engine)
        for document in store.known():
            self.library.add(document)
        memory = MemoryPlan(engine, self.plan.memory_bytes)
        worker = Worker(engine, store, self.metrics, memory, self.plan.limits)
        self.metrics.watch("queue", "Requests that wait", lambda: worker.waiting)
        self.metrics.watch("running", "Answers being decoded", lambda: worker.running)
        self.metrics.watch_places("sessions", "Sessions kept", lambda where: len(held(store, where)))
        self.metrics.watch_places(
            "session_bytes", "Bytes of kept sessions", lambda where: sum(kept.bytes for kept in held(store, where))
        )
        return Loaded(engine, store, worker, Wording(engine, self.library, self.find))

    def stop(self, timeout: float = 60.0) -> None:
        """End the engine's thread after its running unit."""
        if self._loaded is not None:
            self._loaded.worker.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if self._loaded is not None:
            self._loaded.store.close()
        self.words.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        """Whether the model is there."""
        return self._loaded is not None

    @property
    def loaded(self) -> Loaded:
        """The parts that need the model; 503 while it loads."""
        if self._loaded is None:
            raise broken("the model is being loaded; try again later", 503)
        return self._loaded

    @property
    def model(self) -> str:
        """The name of the model that is served."""
        return self.loaded.engine.model.name

    @property
    def fingerprint(self) -> str:
        """What decides the answers, for ``system_fingerprint``."""
        engine = self.loaded.engine
        return f"apb_jax-{engine.method.name}-sp{engine.shards}-{engine.model.dtype.name}"

    def fit(self, document: Document, query: np.ndarray, options: Options, param: str = "messages") -> Ask:
        """An Ask with as many new tokens as were asked for; refused where the model has too few positions."""
        positions = self.loaded.engine.model.config.max_positions
        given = len(document.ids) + len(query)
        room = positions - given
        asked = options.max_tokens
        if room < (asked or 1):
            raise too_long(
                f"this model has {positions} positions; {given} tokens in {param} and {asked or 1} in the answer are "
                f"{given + (asked or 1)}; shorten the document by {given + (asked or 1) - positions} tokens"
                + (f" or ask for at most {room} new ones" if asked and room > 0 else ""),
                param,
            )
        if self.loaded.store.get(document.key) is None:
            self.loaded.worker.memory.check(len(document.ids), param)
        return Ask(document, query, options, min(self.plan.defaults.new_tokens, room) if asked is None else asked)

    def submit(self, ask: Ask) -> Ticket:
        """Hand an Ask to the engine's thread; call on the event loop."""
        ticket = Ticket(ask.document, lambda session, cached: answer(ask, session, cached), ask.prompt_tokens)
        self.loaded.worker.submit(ticket)
        return ticket

    # ---- what is told ----------------------------------------------------------------------------------------------

    def describe(self, document: Document, kept: dict[str, Stored] | None = None) -> dict[str, Any]:
        """A document as a resource: its size, and where its session is."""
        loaded = self.loaded
        found = (self.kept() if kept is None else kept).get(document.key)
        prefill = loaded.worker.prefills.get(document.key)
        told: dict[str, Any] = {
            "id": document.id,
            "object": "document",
            "created": document.created,
            "name": document.name,
            "kept": document.given,
            "characters": len(document.text),
            "tokens": len(document.ids),
            "method": loaded.engine.method.name,
        }
        if found is not None and found.problem is not None:
            return told | self.refused(found)
        if found is not None:
            return told | {
                "status": "ready",
                "session_bytes": found.bytes,
                "where": found.where,
                "method": found.method,
                "prefill_s": found.prefill_s,
                "layout": list(found.layout),
                "notes": list(dict.fromkeys([*found.notes, "prefilled without the question"])),
            }
        if prefill is not None:
            at = prefill.progress
            if at is None:
                return told | {"status": "queued"}
            progress = {"total": at.total, "processed": at.processed, "time_ms": at.time_ms, "eta_ms": at.eta_ms}
            return told | {"status": "prefilling", "progress": progress}
        failure = loaded.worker.failures.get(document.key)
        return told | ({"status": "failed", "error": failure} if failure else {"status": "not prefilled"})

    def kept(self) -> dict[str, Stored]:
        """What the store holds by key; where a session is in both places, the one on the devices."""
        return {one.key: one for one in self.loaded.store.list()}

    def refused(self, kept: Stored) -> dict[str, Any]:
        """A session on disk that does not load."""
        return {
            "id": f"doc-{kept.key[:24]}",
            "object": "document",
            "name": kept.name,
            "status": "refused",
            "error": kept.problem,
            "session_bytes": kept.bytes,
            "where": kept.where,
            "method": kept.method,
        }

    def find(self, name: str) -> Document:
        """The document of this id; 404 where there is none, 409 where there is a session that does not load."""
        try:
            return self.library.find(name)
        except Refusal:
            for one in self.loaded.store.list():
                if one.problem is not None and name == f"doc-{one.key[:24]}":
                    self.loaded.store.loading(one.key)
            raise

    def forget(self, name: str) -> None:
        """Delete a document and its session, wherever they are; 404 where there is neither."""
        store = self.loaded.store
        keys = {one.key for one in store.list() if name == f"doc-{one.key[:24]}"}
        try:
            keys.add(self.library.remove(name).key)
        except Refusal:
            if not keys:
                raise
        for key in keys:
            store.delete(key)

    def memory(self) -> dict[str, Any]:
        """Bytes by the devices' own count where they have one, and of the kept sessions by their shapes."""
        loaded = self.loaded
        stats = [device.memory_stats() for device in loaded.engine.mesh.devices.flat]
        known = [one for one in stats if one]
        kept = loaded.store.list()
        return {
            "devices": len(stats),
            "kind": jax.devices()[0].device_kind,
            "used_bytes": sum(one["bytes_in_use"] for one in known) if known else None,
            "limit_bytes": sum(one["bytes_limit"] for one in known) if known else None,
            "sessions": len({one.key for one in kept}),
            "session_bytes": sum(one.bytes for one in kept if one.where == "device"),
            "session_limit_bytes": getattr(loaded.store, "limit", None),
            "disk_bytes": sum(one.bytes for one in kept if one.where == "disk"),
            "disk_limit_bytes": getattr(loaded.store, "disk_limit", None),
        }


def held(store: SessionStore, where: str) -> list[Stored]:
    """The sessions in one place."""
    return [one for one in store.list() if one.where == where]

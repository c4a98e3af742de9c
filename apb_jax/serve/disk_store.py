"""Sessions in device memory and in folders behind it, which a restart survives."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.serve.documents import LEAST_TOKENS, Document
from apb_jax.serve.refusal import Refusal
from apb_jax.serve.store import DeviceStore, Gone, Loading, Stored
from apb_jax.session import Session
from apb_jax.session_store import Manifest, kept, load_steps, read_beside, read_documents, remove, save
from apb_jax.session_store.identity import check_engine
from apb_jax.weights.atomic import PARTIAL, unfinished

log = logging.getLogger("apb_jax.serve")
LABEL = "document.json"
"""Beside a session: the document's text and name, for the server that finds it."""
SUFFIX = ".session"
LOCK = ".server-lock"
FOLDER = re.compile(r"([0-9a-f]{64})\.session")


class DiskStore:
    """A ``DeviceStore`` and, behind it, a folder a session, at most ``limit`` bytes of them; oldest use goes first.

    Sessions are written by a thread of the store's own while they answer. One that was let go from device memory before
    its turn came is not written. Sessions that do not load stay until they are deleted or their bytes are needed.
    """

    def __init__(self, engine: Engine, device: DeviceStore, root: Path, limit: int) -> None:
        """Takes stock of ``root``; UserError where it cannot be written or belongs to another server."""
        self.engine, self.device, self.root, self.disk_limit = engine, device, root, limit
        self._on_disk: OrderedDict[str, Stored] = OrderedDict()
        self._documents: list[Document] = []
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sessions")
        self._closing = False
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"--sessions {root} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise UserError(f"--sessions {root} is another server's; give this one a folder of its own") from error
        _ = engine.fingerprint  # now: the writer's thread must start no programs that several devices run together
        self._take_stock()
        self._prune(limit)

    @property
    def limit(self) -> int:
        """Bytes of sessions in device memory."""
        return self.device.limit

    def _take_stock(self) -> None:
        for folder in self.root.glob(f"*{SUFFIX}*{PARTIAL}"):
            if unfinished(folder):
                shutil.rmtree(folder)
        for one in kept(self.root):
            found = FOLDER.fullmatch(one.folder.name)
            if not found:
                continue
            stored = Stored(found[1], one.bytes, "disk", one.used, "", 0.0, problem=one.problem)
            if one.manifest is not None:
                method = one.manifest.method.name
                stored = replace(stored, method=method, prefill_s=one.manifest.prefill_s)
                try:
                    document = _document(one.folder, one.manifest, found[1])
                    stored = replace(stored, name=document.name)
                    check_engine(self.engine, one.manifest, one.folder)
                    self._documents.append(document)
                except UserError as error:
                    stored = replace(stored, problem=str(error))
            self._on_disk[found[1]] = replace(stored, problem=stored.problem and self._words(stored.problem))

    def _words(self, problem: str) -> str:
        """A problem without the machine's path."""
        return problem.replace(f"{self.root}{os.sep}", "session ")

    def known(self) -> Sequence[Document]:
        return list(self._documents)

    # ---- what a store does -----------------------------------------------------------------------------------------

    def get(self, key: str) -> Session | None:
        session = self.device.get(key)
        if session is not None:
            self._use(key)
        return session

    def _use(self, key: str) -> Stored | None:
        with self._lock:
            stored = self._on_disk.get(key)
            if stored is not None:
                self._on_disk[key] = replace(stored, used=time.time())
                self._on_disk.move_to_end(key)
            return stored

    def loading(self, key: str) -> Loading | None:
        stored = self._use(key)
        if stored is None:
            return None
        if stored.problem is not None:
            raise self._refusal(key, stored.problem)
        return self._load(key)

    def _load(self, key: str) -> Generator[tuple[int, int], None, Session]:
        try:
            session = yield from load_steps(self.engine, self._folder(key))
            session.notes = tuple(self._words(note) for note in session.notes)
            return session
        except UserError as error:
            problem = self._words(str(error))
            with self._lock:
                if key not in self._on_disk:  # pruned or deleted meanwhile
                    raise Gone(key) from error
                self._on_disk[key] = replace(self._on_disk[key], problem=problem)
            raise self._refusal(key, problem) from error

    @staticmethod
    def _refusal(key: str, problem: str) -> Refusal:
        advice = f"DELETE /v1/documents/doc-{key[:24]} and give the document again"
        return Refusal(409, f"{problem}; {advice}", param="document_id", code="session_refused")

    def put(self, document: Document, session: Session) -> None:
        self.device.put(document, session)
        with self._lock:
            there = document.key in self._on_disk or self._closing
        if not there and len(document.ids) >= LEAST_TOKENS:
            self._writer.submit(self._write, document, weakref.ref(session))

    def list(self) -> list[Stored]:
        with self._lock:
            disk = list(self._on_disk.values())
        return [*disk, *self.device.list()]

    def delete(self, key: str) -> bool:
        gone = self.device.delete(key)
        with self._lock:
            stored = self._on_disk.pop(key, None)
        if stored is not None:
            self._remove(key)
        elif not self._closing:  # it may be on its way to the disk
            self._writer.submit(self._drop, key)
        return gone or stored is not None

    def make_room(self, count: int) -> None:
        self.device.make_room(count)

    def let_go(self) -> bool:
        return self.device.let_go()

    def close(self) -> None:
        """Finish the session that is being written; those behind it are not written."""
        self._closing = True
        self._writer.shutdown(wait=True, cancel_futures=True)
        os.close(self._handle)

    # ---- the disk --------------------------------------------------------------------------------------------------

    def _folder(self, key: str) -> Path:
        return self.root / f"{key}{SUFFIX}"

    def _write(self, document: Document, reference: weakref.ref[Session]) -> None:
        session = reference()
        with self._lock:
            there = document.key in self._on_disk
        if session is None or there or self._closing:
            return
        if _disk_bytes(session) > self.disk_limit:
            log.warning("a session of %d bytes is not written: --sessions-bytes is less", _disk_bytes(session))
            return
        label = {name: getattr(document, name) for name in ("text", "name", "given", "created")}
        try:
            self._prune(self.disk_limit - _disk_bytes(session))
            manifest = save(session, self._folder(document.key), {LABEL: json.dumps(label).encode()})
        except UserError as error:
            log.warning("a session was not written: %s", self._words(str(error)))
            return
        except Exception:
            log.exception("a session was not written")
            return
        size = sum(path.stat().st_size for path in self._folder(document.key).iterdir())
        with self._lock:
            self._on_disk[document.key] = Stored(
                document.key, size, "disk", time.time(), manifest.method.name, manifest.prefill_s
            )
        self._prune(self.disk_limit)

    def _drop(self, key: str) -> None:
        with self._lock:
            stored = self._on_disk.pop(key, None)
        if stored is not None:
            self._remove(key)

    def _prune(self, limit: int) -> None:
        while True:
            with self._lock:
                total = sum(one.bytes for one in self._on_disk.values())
                if total <= max(0, limit) or not self._on_disk:
                    return
                key, _ = self._on_disk.popitem(last=False)
            self._remove(key)

    def _remove(self, key: str) -> None:
        try:
            remove(self._folder(key))
        except (UserError, OSError) as error:
            log.warning("a session was not removed: %s", self._words(str(error)))


def _disk_bytes(session: Session) -> int:
    """About as many bytes as a session takes on disk: its rows without padding."""
    cache = session.cache
    return int(session.layout.kept_tokens.sum()) * cache.layers * cache.row_bytes


def _document(folder: Path, manifest: Manifest, key: str) -> Document:
    """The document of a session, with the ids that were prefilled; UserError where they are not those of ``key``."""
    label, documents = read_beside(folder, manifest, LABEL), read_documents(folder, manifest)
    if label is None or len(documents) != 1:
        raise UserError(f"{folder} was not written by a server")
    told = json.loads(label)
    document = Document(told["text"], documents[0], told["name"], told["given"], told["created"])
    if document.key != key:
        raise UserError(f"{folder} holds another document, {document.id}")
    return document

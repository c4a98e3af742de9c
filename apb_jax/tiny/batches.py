"""Batch workers: forked processes that make training rows ahead of the device. Fork before JAX opens a device."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from types import TracebackType
from typing import Any

from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import Haystack
from apb_jax.tiny.rows import Rows, make_rows, training_world


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _work(
    requests: Any, results: Any, encoder: Encoder, haystacks: tuple[Haystack, ...], limit: int, parent: int
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's handlers came along with the fork
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.disable()  # samples hold no cycles, and collecting costs more than making them
    while (request := requests.get()) is not None:
        index, seed, rows, length = request
        try:
            world = training_world(encoder, haystacks, [seed, index])
            results.put((index, make_rows(world, rows, length, limit)))
        except Exception:  # noqa: BLE001  -- handed to the parent, which raises it
            results.put((index, traceback.format_exc()))


class BatchWorkers:
    """``request`` shapes ahead of time; ``take`` returns the batches in the order of the requests."""

    def __init__(
        self, encoder: Encoder, haystacks: tuple[Haystack, ...], *, workers: int, seed: int, max_positions: int
    ) -> None:
        context = mp.get_context("fork")
        self._seed = seed
        self._requests, self._results = context.Queue(), context.Queue()
        self._next = 0
        self._waiting: deque[int] = deque()
        self._ready: dict[int, Rows] = {}
        self._processes = [
            context.Process(
                target=_work,
                args=(self._requests, self._results, encoder, haystacks, max_positions, os.getpid()),
                daemon=True,
            )
            for _ in range(workers)
        ]
        for process in self._processes:
            process.start()

    @property
    def pending(self) -> int:
        """Requests not yet taken."""
        return len(self._waiting)

    def request(self, rows: int, length: int) -> None:
        """Ask for one batch; its content depends on the seed and the number of the request alone."""
        self._requests.put((self._next, self._seed, rows, length))
        self._waiting.append(self._next)
        self._next += 1

    def take(self, *, wait: bool = True) -> Rows | None:
        """The oldest batch asked for; with ``wait=False`` None if it is not made yet."""
        index = self._waiting[0]
        while index not in self._ready:
            try:
                done, rows = self._results.get(timeout=120) if wait else self._results.get_nowait()
            except queue.Empty:
                if wait:
                    raise RuntimeError("no batch came from the workers in 120 s") from None
                return None
            if isinstance(rows, str):
                raise RuntimeError(f"a batch worker failed:\n{rows}")
            self._ready[done] = rows
        self._waiting.popleft()
        return self._ready.pop(index)

    def __enter__(self) -> BatchWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

"""One server on a free port for all tests of this folder: the packaged model, its own thread, a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

import apb_jax
from apb_jax.serve.background import Background
from apb_jax.serve.guard import Gate
from apb_jax.serve.requests import Defaults
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore
from apb_jax.serve.worker import Limits
from apb_jax.weights.checkpoint import load


def serve(engine: apb_jax.Engine, gate: Gate | None = None, limits: Limits | None = None) -> Background:
    """A server around an engine that is there; answers are short unless asked otherwise."""
    plan = Plan(lambda: engine, lambda _: DeviceStore(1 << 28), limits or Limits(), Defaults(new_tokens=8))
    return Background(plan, gate)


@pytest.fixture(scope="session")
def engine() -> apb_jax.Engine:
    return apb_jax.Engine(load("tiny"), "full", apb_jax.make_mesh(sp=1))


@pytest.fixture(scope="session")
def server(engine: apb_jax.Engine) -> Iterator[Background]:
    made = serve(engine)
    yield made
    made.close()


@pytest.fixture
def another(engine: apb_jax.Engine) -> Iterator[Callable[..., Background]]:
    """Makes servers of other settings around the same engine."""
    made: list[Background] = []

    def make(**settings: Any) -> Background:
        made.append(serve(engine, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def http(server: Background) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@dataclass
class Brake:
    """Listens to the engine: ``hold(stage)`` stops its thread at the next such stage until ``release``."""

    seen: list[tuple[str, int]] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    at: tuple[str, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done))
        if self.at == (stage, done):
            self.stopped.set()
            assert self.free.wait(60)

    def hold(self, stage: str, done: int) -> None:
        self.seen.clear()
        self.free.clear()
        self.stopped.clear()
        self.at = stage, done

    def release(self) -> None:
        self.at = None
        self.free.set()


@pytest.fixture
def brake(engine: apb_jax.Engine) -> Iterator[Brake]:
    made = Brake()
    engine.listen(made)
    yield made
    made.release()
    engine.listen(None)

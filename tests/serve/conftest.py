"""One server on a free port for all tests of this folder: the packaged model, its own thread, a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

import apb_jax
from apb_jax.serve.app import make_app
from apb_jax.serve.guard import Gate
from apb_jax.serve.requests import Defaults
from apb_jax.serve.service import Plan, Service
from apb_jax.serve.store import DeviceStore
from apb_jax.serve.worker import Limits
from apb_jax.weights.checkpoint import load


@dataclass
class Server:
    """A running server and what is behind it."""

    service: Service
    url: str
    uvicorn: uvicorn.Server
    thread: threading.Thread

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"apb_{name}", labels) or 0.0

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.service.stop()


def serve(engine: apb_jax.Engine, gate: Gate | None = None, limits: Limits | None = None) -> Server:
    """A server around an engine that is there; answers are short unless asked otherwise."""
    plan = Plan(lambda: engine, lambda _: DeviceStore(1 << 28), limits or Limits(), Defaults(new_tokens=8))
    service = Service(plan)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(256)
    config = uvicorn.Config(
        make_app(service, gate or Gate()), log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    ready = threading.Event()
    service.start(ready.set)

    def run() -> None:
        asyncio.run(server.serve(sockets=[sock]))
        sock.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    return Server(service, f"http://127.0.0.1:{sock.getsockname()[1]}", server, thread)


@pytest.fixture(scope="session")
def engine() -> apb_jax.Engine:
    return apb_jax.Engine(load("tiny"), "full", apb_jax.make_mesh(sp=1))


@pytest.fixture(scope="session")
def server(engine: apb_jax.Engine) -> Iterator[Server]:
    made = serve(engine)
    yield made
    made.close()


@pytest.fixture
def another(engine: apb_jax.Engine) -> Iterator[Callable[..., Server]]:
    """Makes servers of other settings around the same engine."""
    made: list[Server] = []

    def make(**settings: Any) -> Server:
        made.append(serve(engine, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
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

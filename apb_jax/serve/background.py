"""A server in a thread of this process: for notebooks, tests and benchmarks."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

import uvicorn

from apb_jax.serve.app import make_app
from apb_jax.serve.guard import Gate
from apb_jax.serve.listen import bind
from apb_jax.serve.service import Plan, Service


class Background:
    """Serves on a free port of 127.0.0.1 from construction to ``close``; a context manager."""

    def __init__(self, plan: Plan, gate: Gate | None = None) -> None:
        """Returns once the model is there; raises what kept it from loading."""
        self.service = Service(plan)
        sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            make_app(self.service, gate or Gate()), log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        settled = threading.Event()
        self.service.start(settled.set, settled.set)
        settled.wait()
        if self.service.failure is not None:
            sock.close()
            raise self.service.failure

        def run() -> None:
            asyncio.run(self._server.serve(sockets=[sock]))
            sock.close()

        self._thread = threading.Thread(target=run, name="http", daemon=True)
        self._thread.start()

    def metric(self, name: str, **labels: str) -> float:
        """A figure of ``/metrics``; 0 where nothing was counted yet."""
        return self.service.metrics.registry.get_sample_value(f"apb_{name}", labels) or 0.0

    def close(self) -> None:
        """Finish running requests for a second, then end both threads."""
        self._server.should_exit = True
        self._thread.join(30)
        self.service.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

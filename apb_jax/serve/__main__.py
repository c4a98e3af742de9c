"""``python -m apb_jax.serve``: bind the port, answer /health at once, load the model, say so, serve until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from apb_jax.command import command
from apb_jax.errors import UserError
from apb_jax.install import install_hint
from apb_jax.serve.listen import bind
from apb_jax.serve.options import ServeConfig, parse


def serve(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM; 0, or a UserError for what the model or the machine cannot do."""
    keys = config.keys()
    sock = bind(config.host, config.port)
    with contextlib.closing(sock):
        try:
            import uvicorn

            from apb_jax.serve.app import make_app
        except ImportError as error:
            raise UserError(f"the server needs {error.name}; {install_hint('serve')}") from error
        from apb_jax.serve.guard import LOOPBACK, Gate
        from apb_jax.serve.service import Service
        from apb_jax.serve.start import choose_devices, plan

        choose_devices(config)
        service = Service(plan(config))
        local = config.host in LOOPBACK
        gate = Gate(keys, config.max_body, LOOPBACK if local else None, config.cors_origin)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(service, gate),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(config.grace)),
            )
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{host}:{sock.getsockname()[1]}"

        def leave() -> None:
            server.should_exit = True

        # The server's own way to end; uvicorn raises a signal again once it has shut down, by then it is answered.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        service.start(lambda: print(f"ready: {address}", flush=True), leave)
        asyncio.run(server.serve(sockets=[sock]))
        service.stop()
        if service.failure is not None:
            raise service.failure
        return 0


@command("python -m apb_jax.serve")
def main(argv: list[str]) -> int:
    """Exit status: 0 after a signal that ended a running server, or 2 with one line on standard error."""
    return serve(parse(argv))


if __name__ == "__main__":
    sys.exit(main())

"""What stands in front of every route: who may ask, from where, with how large a body; and the count of requests."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apb_jax.serve.metrics import Metrics
from apb_jax.serve.refusal import Refusal

OPEN = ("/", "/health")
"""Paths that need no key: the page asks for one, and a probe has none."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Gate:
    """Who is let in."""

    keys: tuple[bytes, ...] = ()
    """API keys; none: everybody."""
    largest_body: int = 64 << 20
    hosts: tuple[str, ...] | None = None
    """Names that ``Host`` may have; None: any. Keeps web pages from reaching a local server by a name of their own."""
    origins: tuple[str, ...] = ()
    """Origins of pages of others that may ask."""

    def check(self, path: str, headers: Headers) -> None:
        """Raises a Refusal: 403 host or origin, 401 key, 413 a body announced as too large."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if host.isascii() else None
        if self.hosts is not None and name not in self.hosts:
            raise Refusal(403, "this server is asked by a name that is not its own; use 127.0.0.1", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise Refusal(403, "pages of other origins may not ask; see --cors-origin", code="wrong_origin")
        if self.keys and path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            raw = given.strip().encode("utf-8", "surrogateescape")
            # Every key is compared, so that the time does not tell which one was near.
            found = [hmac.compare_digest(raw, key) for key in self.keys]
            if kind.lower() != "bearer" or not any(found):
                raise Refusal(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.largest_body:
            raise self.too_large()

    def too_large(self) -> Refusal:
        """413."""
        return Refusal(413, f"the body is larger than {self.largest_body} bytes (--max-body)", code="body_too_large")


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, gate: Gate, metrics: Metrics) -> None:
        self.app, self.gate, self.metrics = app, gate, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = 0

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.request(route, message["status"])
            await send(message)

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.gate.largest_body:
                raise self.gate.too_large()
            return message

        try:
            self.gate.check(scope["path"], Headers(scope=scope))
        except ValueError:  # a Host or Origin that is no address
            await Refusal(400, "Host or Origin is not an address").response()(scope, receive, counted)
        except Refusal as refusal:
            await refusal.response()(scope, receive, counted)
        else:
            await self.app(scope, limited, counted)

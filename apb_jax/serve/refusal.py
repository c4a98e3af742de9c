"""A request that is refused, in the nested error form of OpenAI's API, by which its clients choose their exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class Refusal(Exception):
    """One line for the client: what is wrong, the rule, the nearest legal choice. Never holds the client's text."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the reply."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole reply."""
        return JSONResponse(self.to_json(), self.status, self.headers)


def wrong(param: str, message: str) -> Refusal:
    """400: a value that cannot be."""
    return Refusal(400, message, param=param, code="invalid_value")


def too_long(message: str, param: str = "messages") -> Refusal:
    """400: more tokens than the model has positions."""
    return Refusal(400, message, param=param, code="context_length_exceeded")


def not_found(what: str, param: str, code: str = "not_found") -> Refusal:
    """404."""
    return Refusal(404, what, param=param, code=code)


def busy(waiting: int) -> Refusal:
    """429: the queue is full."""
    return Refusal(
        429,
        f"{waiting} requests wait already; try again later",
        code="queue_full",
        kind="rate_limit_error",
        headers={"Retry-After": "5"},
    )


def broken(message: str, status: int = 500) -> Refusal:
    """500 and 503: not the client's fault."""
    return Refusal(status, message, kind="server_error")

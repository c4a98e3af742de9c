"""Events to the client: as server-sent events while they come, or as one body at the end; a gone client cancels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from apb_jax.serve.answering import Finished, Fresh, Progress
from apb_jax.serve.refusal import Refusal
from apb_jax.serve.replies import Reply
from apb_jax.serve.worker import Ticket

PING_S = 10.0
"""A stream is silent for at most so long: proxies cut silent connections."""
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def events_of(reply: Reply, ticket: Ticket) -> AsyncIterator[bytes]:
    """The stream of an answer, from the role to ``[DONE]``; closing it cancels the ticket."""
    try:
        for chunk in reply.opening():
            yield sse(chunk)
        last_progress = asyncio.get_running_loop().time()
        while True:
            try:
                event = await asyncio.wait_for(ticket.events.get(), PING_S)
            except TimeoutError:
                yield PING
                continue
            if isinstance(event, Refusal):
                yield sse(event.to_json())
                return
            if isinstance(event, Progress):
                now = asyncio.get_running_loop().time()
                if reply.ask.options.return_progress:
                    yield sse(reply.progress(event))
                elif now - last_progress >= PING_S:
                    last_progress = now
                    yield PING
            elif isinstance(event, Fresh):
                if event.text or event.tokens:
                    yield sse(reply.delta(event))
            else:
                for chunk in reply.closing(event):
                    yield sse(chunk)
                yield DONE
                return
    finally:
        ticket.cancel()


def stream(reply: Reply, ticket: Ticket) -> Response:
    """The answer as it comes."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events_of(reply, ticket), media_type="text/event-stream", headers=headers)


async def until_gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(ticket: Ticket) -> tuple[list[Any], Finished]:
    """(all events but progress, the end) of a ticket; raises what it was refused with."""
    parts: list[Any] = []
    while True:
        event = await ticket.events.get()
        if isinstance(event, Refusal):
            raise event
        if isinstance(event, Finished):
            return parts, event
        if not isinstance(event, Progress):
            parts.append(event)


async def wait_or_cancel(request: Request, ticket: Ticket) -> tuple[list[Any], Finished] | None:
    """``collect``, or None where the client went away before; the ticket is cancelled then."""
    answer, gone = asyncio.ensure_future(collect(ticket)), asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        ticket.cancel()
        for task in (answer, gone):
            task.cancel()


async def at_once(request: Request, reply: Reply, ticket: Ticket) -> Response:
    """The whole answer in one body."""
    found = await wait_or_cancel(request, ticket)
    if found is None:
        return Response(status_code=499)  # nobody reads it; nginx' number in the metrics
    return JSONResponse(reply.whole(*found))

"""The routes: thin functions between requests and the service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from apb_jax.report import versions
from apb_jax.serve import replies, streaming
from apb_jax.serve.answering import Ask
from apb_jax.serve.documents import Document
from apb_jax.serve.fields import Fields, clean_text, parse_json
from apb_jax.serve.guard import Gate, Guard
from apb_jax.serve.receipts import exact_method, receipt_units
from apb_jax.serve.refusal import Refusal, broken, wrong
from apb_jax.serve.requests import Options, parse_chat, parse_completion, parse_question
from apb_jax.serve.service import Service
from apb_jax.serve.worker import Ticket

PAGE = Path(__file__).with_name("page.html")


class Routes:
    """Every endpoint of the server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.page_text = PAGE.read_text(encoding="utf-8")
        self.prefills: dict[str, Ticket] = {}
        """Prefills that were asked for without a question, by document id: no connection stands behind them."""

    def table(self) -> list[Route]:
        """Paths and methods."""
        return [
            Route("/", self.page, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/status", self.status, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/v1/documents", self.add_document, methods=["POST"]),
            Route("/v1/documents", self.documents, methods=["GET"]),
            Route("/v1/documents/{id}", self.document, methods=["GET"]),
            Route("/v1/documents/{id}", self.remove_document, methods=["DELETE"]),
            Route("/v1/documents/{id}/questions", self.question, methods=["POST"]),
            Route("/v1/documents/{id}/receipt", self.receipt, methods=["POST"]),
        ]

    # ---- about the server ------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page to ask in; it may load nothing from elsewhere."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": f"{policy}; img-src data:; base-uri 'none'; form-action 'none'"}
        return HTMLResponse(self.page_text, headers=headers | {"Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        """200 once the model is there, 503 before."""
        ready = self.service.ready
        return JSONResponse({"status": "ok" if ready else "loading model"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text form."""
        return Response(self.service.metrics.text(), media_type=self.service.metrics.content_type)

    def model_json(self) -> dict[str, Any]:
        config = self.service.loaded.engine.model.config
        return {
            "id": self.service.model,
            "object": "model",
            "created": 0,
            "owned_by": "apb_jax",
            "max_model_len": config.max_positions,
        }

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self.model_json()]})

    async def model(self, request: Request) -> Response:
        """The one model by its name."""
        if request.path_params["model"] != self.service.model:
            raise Refusal(404, f"this server has one model, {self.service.model!r}", code="model_not_found")
        return JSONResponse(self.model_json())

    async def status(self, request: Request) -> Response:
        """Model, method, mesh, memory and queue: what the page shows."""
        loaded = self.service.loaded
        engine = loaded.engine
        return JSONResponse(
            {
                "object": "status",
                "model": self.service.model,
                "max_model_len": engine.model.config.max_positions,
                "layers": engine.model.config.num_layers,
                "dtype": engine.model.dtype.name,
                "method": engine.method.name,
                "exact": engine.can.exact,
                "exact_method": exact_method(engine),
                "shards": engine.shards,
                "mesh": dict(engine.mesh.shape),
                "memory": self.service.memory(),
                "waiting": loaded.worker.waiting,
                "running": loaded.worker.running,
                "versions": versions(),
            }
        )

    # ---- answers ---------------------------------------------------------------------------------------------------

    async def fields(self, request: Request) -> Fields:
        """The JSON body; parsed beside the loop, for it may be a book."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "the body must be JSON; send Content-Type: application/json", code="wrong_content_type")
        return await self.beside(parse_json, await request.body())

    async def beside(self, work: Callable[..., Any], *given: Any) -> Any:
        """Run host work in the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.service.words, partial(work, *given))

    async def reply(self, request: Request, kind: type[replies.Reply], ask: Ask) -> Response:
        """Answer in this shape, streaming or not."""
        ticket = self.service.submit(ask)
        shape = kind(self.service.model, self.service.fingerprint, ask)
        if ask.options.stream:
            return streaming.stream(shape, ticket)
        return await streaming.at_once(request, shape, ticket)

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        service, wording = self.service, self.service.loaded.wording
        fields = await self.fields(request)

        def word() -> Ask:
            asked = parse_chat(fields, service.model, service.plan.defaults)
            return service.fit(*wording.chat(asked), asked.options)

        return await self.reply(request, replies.ChatReply, await self.beside(word))

    async def completion(self, request: Request) -> Response:
        """OpenAI's text completions."""
        service, wording = self.service, self.service.loaded.wording
        fields = await self.fields(request)

        def word() -> Ask:
            asked = parse_completion(fields, service.model, service.plan.defaults)
            return service.fit(*wording.completion(asked), asked.options, "prompt")

        return await self.reply(request, replies.CompletionReply, await self.beside(word))

    async def asked(self, request: Request) -> Ask:
        """The Ask of a question to the document in the path."""
        service, wording = self.service, self.service.loaded.wording
        document = service.find(request.path_params["id"])
        fields = await self.fields(request)

        def word() -> Ask:
            asked = parse_question(fields, service.plan.defaults)
            return service.fit(document, wording.query("", list(asked.turns)), asked.options, "question")

        return await self.beside(word)  # type: ignore[no-any-return]

    async def question(self, request: Request) -> Response:
        """An answer as a resource of its document."""
        return await self.reply(request, replies.AnswerReply, await self.asked(request))

    async def receipt(self, request: Request) -> Response:
        """The question answered by exact attention as well, and what differs."""
        engine = self.service.loaded.engine
        ask = await self.asked(request)
        if engine.method.name == exact_method(engine):
            raise Refusal(
                409, f"the server runs {engine.method.name}, which is exact: nothing to compare", code="exact"
            )
        units = lambda session, cached: receipt_units(engine, session, ask.query, min(ask.new_tokens, 64))  # noqa: E731
        ticket = Ticket(ask.document, units, ask.prompt_tokens)
        self.service.loaded.worker.submit(ticket)
        found = await streaming.wait_or_cancel(request, ticket)
        return Response(status_code=499) if found is None else JSONResponse(found[0][0].receipt)

    # ---- documents -------------------------------------------------------------------------------------------------

    async def document_text(self, request: Request) -> tuple[str, str, bool]:
        """(text, name, whether to prefill now) of a JSON body or an uploaded file."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            fields = await self.fields(request)
            later = fields.given("prefill") and not fields.flag("prefill")
            return fields.needed_text("text"), (fields.text("name") or "")[:200], not later
        try:
            form = await request.form(max_files=1, max_fields=8)
        except (MultiPartException, HTTPException, ValueError):
            raise Refusal(400, "the form is not multipart data with one file", code="invalid_form") from None
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(form.close)
            part = form.get("file")
            if part is None or isinstance(part, str):
                raise wrong("file", "the form needs a file in the field 'file'")
            raw = await part.read()
            name = (part.filename or "")[:200]
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise wrong("file", f"the file is not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise wrong("file", "the file is empty; it needs at least one word")
        return text, clean_text(name, "file"), True

    async def add_document(self, request: Request) -> Response:
        """Keep a document and prefill it; 201 where it is new, 200 where it was known."""
        loaded = self.service.loaded
        text, name, now = await self.document_text(request)

        def word() -> tuple[Document, bool]:
            document = loaded.wording.document(text, name, given=True)
            self.service.fit(document, document.ids[:1], Options(1), "text")
            known = any(kept.id == document.id and kept.given for kept in self.service.library.list())
            return self.service.library.add(document), known

        document, known = await self.beside(word)
        running = self.prefills.get(document.id)
        if now and (running is None or running.done):
            ticket = Ticket(document, None, len(document.ids))
            loaded.worker.submit(ticket)
            self.prefills[document.id] = ticket
        return JSONResponse(self.service.describe(document), 200 if known else 201)

    async def documents(self, request: Request) -> Response:
        """All documents, the newest first."""
        service, kept = self.service, self.service.kept()
        told = [service.describe(document, kept) for document in reversed(service.library.list())]
        there = {one["id"] for one in told}
        lost = [service.refused(one) for one in kept.values() if one.problem is not None]
        return JSONResponse({"object": "list", "data": [*told, *(one for one in lost if one["id"] not in there)]})

    async def document(self, request: Request) -> Response:
        """One document."""
        return JSONResponse(self.service.describe(self.service.find(request.path_params["id"])))

    async def remove_document(self, request: Request) -> Response:
        """Forget a document and its session; running answers end."""
        name = request.path_params["id"]
        await asyncio.to_thread(self.service.forget, name)  # a large folder takes its time
        ticket = self.prefills.pop(name, None)
        if ticket is not None:
            ticket.cancel()
        return JSONResponse({"id": name, "object": "document", "deleted": True})


async def refused(request: Request, error: Exception) -> Response:
    """A Refusal as its reply."""
    assert isinstance(error, Refusal)
    return error.response()


async def no_route(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405 in OpenAI's form."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, f"{error.detail}: no such path or method here", code="not_found")
    return JSONResponse(refusal.to_json(), error.status_code, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """The client closed the connection while its body was read."""
    return Response(status_code=499)


async def failed(request: Request, error: Exception) -> Response:
    """A fault of the server's own; Starlette logs the traceback."""
    return broken("the server failed on this request; its log says how").response()


def make_app(service: Service, gate: Gate) -> Starlette:
    """The ASGI application."""
    middleware = [Middleware(Guard, gate=gate, metrics=service.metrics)]
    if gate.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(gate.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {Refusal: refused, HTTPException: no_route, ClientDisconnect: gone, Exception: failed}
    return Starlette(routes=Routes(service).table(), middleware=middleware, exception_handlers=handlers)

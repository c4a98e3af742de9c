"""Answers in OpenAI's shapes: chat completions, text completions, and the answers of documents."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from apb_jax.serve.answering import Ask, Finished, Fresh, Progress, TokenLogprob

Json = dict[str, Any]


def usage(ask: Ask, end: Finished) -> Json:
    """Tokens of prompt and answer; cached ones were in a session before the request came."""
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": ask.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def token_json(token: TokenLogprob) -> Json:
    """A token of ``logprobs.content``."""

    def one(of: TokenLogprob) -> Json:
        return {"token": of.token, "logprob": of.logprob, "bytes": list(of.raw)}

    return one(token) | {"top_logprobs": [one(other) for other in token.top]}


@dataclass
class Reply:
    """One answer on its way out. Subclasses say how a choice looks; chunks and the whole share the rest."""

    model: str
    fingerprint: str
    ask: Ask
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    shown: int = 0
    """Characters so far: where a completion's next token starts."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def frame(self, kind: str, choices: list[Json]) -> Json:
        """What every object has around its choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def chunk(self, choices: list[Json]) -> Json:
        """One event of a stream; ``usage: null`` in all but the last where that was asked for."""
        return self.frame(self.chunk_object, choices) | ({"usage": None} if self.ask.options.include_usage else {})

    def opening(self) -> list[Json]:
        """Chunks before any text."""
        return []

    def delta(self, fresh: Fresh) -> Json:
        """A chunk of text."""
        chunk = self.chunk([self.choice(fresh, None, streaming=True)])
        self.shown += len(fresh.text)
        return chunk

    def closing(self, end: Finished) -> list[Json]:
        """The chunk with the reason, and the usage."""
        chunks = [self.chunk([self.choice(Fresh(""), end.reason, streaming=True)]) | {"timings": end.times_ms}]
        if self.ask.options.include_usage:
            chunks.append(self.frame(self.chunk_object, []) | {"usage": usage(self.ask, end)})
        return chunks

    def progress(self, at: Progress) -> Json:
        """llama.cpp's form of prompt progress, with an estimate of what is left."""
        told = {
            "total": at.total, "cache": at.cached, "processed": at.processed,
            "time_ms": round(at.time_ms, 1), "eta_ms": None if at.eta_ms is None else round(at.eta_ms, 1),
        }  # fmt: skip
        return self.chunk([]) | {"prompt_progress": told}

    def whole(self, parts: list[Fresh], end: Finished) -> Json:
        """The answer at once."""
        text = Fresh("".join(part.text for part in parts), tuple(token for part in parts for token in part.tokens))
        choices = [self.choice(text, end.reason, streaming=False)]
        return self.frame(self.whole_object, choices) | {"usage": usage(self.ask, end), "timings": end.times_ms}

    def choice(self, fresh: Fresh, reason: str | None, *, streaming: bool) -> Json:
        """One choice with this text."""
        raise NotImplementedError


class ChatReply(Reply):
    """``chat.completion`` and its chunks."""

    prefix = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk([choice])]

    def choice(self, fresh: Fresh, reason: str | None, *, streaming: bool) -> Json:
        logprobs = None
        if self.ask.options.logprobs is not None and (fresh.tokens or not streaming):
            logprobs = {"content": [token_json(token) for token in fresh.tokens], "refusal": None}
        if streaming:
            body: Json = {"delta": {"content": fresh.text} if fresh.text or reason is None else {}}
        else:
            body = {"message": {"role": "assistant", "content": fresh.text, "refusal": None}}
        return {"index": 0} | body | {"logprobs": logprobs, "finish_reason": reason}


class CompletionReply(Reply):
    """``text_completion``, whole or in chunks."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, fresh: Fresh, reason: str | None, *, streaming: bool) -> Json:
        logprobs = None
        if self.ask.options.logprobs is not None and (fresh.tokens or not streaming):
            offsets, at = [], self.shown
            for token in fresh.tokens:
                offsets.append(at)
                at += len(token.token)
            logprobs = {
                "tokens": [token.token for token in fresh.tokens],
                "token_logprobs": [token.logprob for token in fresh.tokens],
                "top_logprobs": [{one.token: one.logprob for one in token.top} for token in fresh.tokens],
                "text_offset": offsets,
            }
        return {"index": 0, "text": fresh.text, "logprobs": logprobs, "finish_reason": reason}


class AnswerReply(Reply):
    """``answer``: what a document's questions get. No choices: there is one answer."""

    prefix = "answer"
    whole_object, chunk_object = "answer", "answer.chunk"

    def frame(self, kind: str, choices: list[Json]) -> Json:
        base = super().frame(kind, choices)
        del base["choices"]
        return base | {"document_id": self.ask.document.id} | (choices[0] if choices else {})

    def choice(self, fresh: Fresh, reason: str | None, *, streaming: bool) -> Json:
        return {"text": fresh.text, "finish_reason": reason}

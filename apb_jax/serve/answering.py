"""One answer as units of work of the engine's thread: the query phase, then chunk by chunk, each with its events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from apb_jax.generation import Generation
from apb_jax.prompt.codec import PromptCodec
from apb_jax.prompt.stream import TextStream, decoder_kinds, token_bytes
from apb_jax.serve.documents import Document
from apb_jax.serve.requests import Options
from apb_jax.serve.stops import StopStrings
from apb_jax.session import Session


@dataclass(frozen=True)
class Ask:
    """What the engine's thread needs to answer."""

    document: Document
    query: np.ndarray
    options: Options
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of document and query."""
        return len(self.document.ids) + len(self.query)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability (nats), and the likeliest ones at its place."""

    token: str
    raw: bytes
    """Its bytes: those of a part of a character are no text."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Progress:
    """A prefill on its way."""

    total: int
    """Prompt tokens."""
    cached: int
    processed: int
    """Tokens times the share of the layers that is done."""
    time_ms: float
    """Since the prefill began."""
    eta_ms: float | None


@dataclass(frozen=True)
class Fresh:
    """New text, with its tokens where log probabilities are wanted."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer, and what it cost."""

    reason: str
    completion_tokens: int
    cached_tokens: int
    times_ms: dict[str, float] = field(default_factory=dict)


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Event = Progress | Fresh | Finished


def answer(ask: Ask, session: Session, cached_tokens: int) -> Iterator[list[Event]]:
    """Each ``next`` runs one unit and gives its events; the last one is ``Finished``."""
    options = ask.options
    generation = session.start(
        ask.query.tolist(),
        ask.new_tokens,
        sampler=options.sampler,
        seed=options.seed,
        logits=options.logprobs is not None,
        answer_alone=True,
    )
    written = Written(session, options)
    while True:
        fresh = written.take(generation)
        done = generation.finished or written.stops.found
        if not done:
            yield [fresh] if fresh.text or fresh.tokens else []
            generation.step()
            continue
        stopped = written.stops.found or bool(generation.stopped[0])
        times = {"query_ms": 1e3 * generation.query_s, "decode_ms": 1e3 * generation.decode_s}
        times["prefill_ms"] = 0.0 if cached_tokens else 1e3 * session.prefill_s
        yield [
            fresh,
            written.end(),
            Finished("stop" if stopped else "length", written.tokens, cached_tokens, times),
        ]
        return


class Written:
    """The text of one generation so far; text and tokens leave it together."""

    def __init__(self, session: Session, options: Options) -> None:
        codec = session.engine.codec
        assert codec is not None
        self.codec = codec
        self.options = options
        self.stream, self.stops = TextStream(codec), StopStrings(options.stop)
        self.tokens = 0
        self._known = self._shown = 0
        self._waiting: list[tuple[int, TokenLogprob]] = []
        """Tokens with the length of the text at their start, until that text is shown."""

    def take(self, generation: Generation) -> Fresh:
        """What the generation has that was not taken yet."""
        text = ""
        for index in range(self.tokens, len(generation.tokens[0])):
            token, start = generation.tokens[0][index], self._known
            piece = self.stream.push([token])
            self._known += len(piece)
            self.tokens += 1
            if self.options.logprobs is not None:
                row = row_of(generation, index)
                self._waiting.append((start, token_logprob(self.codec, token, row, self.options.logprobs)))
            text += self.stops.push(piece)
            if self.stops.found:
                break
        return self._release(text)

    def end(self) -> Fresh:
        """What was held back."""
        text = self.stops.push(self.stream.end()) + self.stops.end()
        fresh = self._release(text)
        rest = () if self.stops.found else tuple(token for _, token in self._waiting)
        self._waiting = []
        return Fresh(fresh.text, fresh.tokens + rest)

    def _release(self, text: str) -> Fresh:
        self._shown += len(text)
        ready = tuple(token for start, token in self._waiting if start < self._shown)
        self._waiting = [(start, token) for start, token in self._waiting if start >= self._shown]
        return Fresh(text, ready)


def row_of(generation: Generation, index: int) -> np.ndarray:
    """Logits [V] from which answer token ``index`` was taken."""
    for rows in generation.step_rows:
        if index < len(rows):
            row: np.ndarray = rows[index, 0]
            return row
        index -= len(rows)
    raise IndexError(index)


def token_logprob(codec: PromptCodec, token: int, logits: np.ndarray, top: int) -> TokenLogprob:
    """Log probability of a token under the model itself (temperature 1), and of the ``top`` likeliest ones."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - np.log(np.exp(wide).sum())
    best = np.argpartition(-logprobs, top - 1)[:top] if top else np.zeros(0, np.int64)
    ordered = best[np.argsort(-logprobs[best], kind="stable")]
    likeliest = tuple(TokenLogprob(*token_text(codec, int(i)), float(logprobs[i])) for i in ordered)
    return TokenLogprob(*token_text(codec, token), float(logprobs[token]), likeliest)


def token_text(codec: PromptCodec, token: int) -> tuple[str, bytes]:
    """(text, bytes) of one token; its text has replacement characters where its bytes are none alone."""
    tokenizer = codec.tokenizer
    name, text = str(tokenizer.convert_ids_to_tokens(token)), codec.decode([token])
    if _BYTE.fullmatch(name):
        return text, bytes([int(name[3:5], 16)])
    kinds = decoder_kinds(tokenizer.backend_tokenizer.decoder)  # type: ignore[attr-defined]
    if "ByteLevel" in kinds and token not in tokenizer.all_special_ids:
        return text, token_bytes(name)
    return text, text.encode()

"""Answers in the making: the host's loop over decoding chunks, and what an answer is when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from apb_jax.attention.layout import bucket
from apb_jax.attention.method import AttentionMethod
from apb_jax.cache import TailCache
from apb_jax.decode import BROKEN, Asked, DecodePlan, DecodeState, decode, query
from apb_jax.errors import UserError
from apb_jax.host_kv import HostCache, Steps
from apb_jax.programs import Lengths
from apb_jax.prompt.ids import as_ids
from apb_jax.sampling import Sampler
from apb_jax.typed import check_types, check_value

if TYPE_CHECKING:
    from apb_jax.engine import Engine
    from apb_jax.session import Session

STOP_GRANULE = 8
"""Stop ids are filled up to a multiple of it: what decode programs are compiled for."""
OnTokens = Callable[[int, list[int]], None]
"""(request, fresh ids): called as tokens arrive."""


@dataclass(frozen=True)
class Wanted:
    """What an answer is asked for with; the same for all requests of a batch."""

    new_tokens: int = 32
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logits: bool = False
    """Logits of every token of the answer, and of the query's rows unless ``answer_alone``."""
    answer_alone: bool = False

    def __post_init__(self) -> None:
        check_types(self, new_tokens="max_new_tokens")
        for name, value, low in (("max_new_tokens", self.new_tokens, 1), ("seed", self.seed, 0)):
            if not low <= value < 2**31:
                raise UserError(f"{name} is {value}; it must lie in {low}..{2**31 - 1}")
        for stop in self.stop_ids:
            if isinstance(stop, bool) or not isinstance(stop, int | np.integer) or not 0 <= stop < 2**31:
                raise UserError(f"stop_ids holds {stop!r}; stop ids are token ids of 0 or more")

    @property
    def stops(self) -> np.ndarray:
        """The stop ids int32 [Z], filled up with -1."""
        slots = max(1, -(-len(self.stop_ids) // STOP_GRANULE)) * STOP_GRANULE
        return np.asarray((*self.stop_ids, *[-1] * (slots - len(self.stop_ids))), np.int32)


def wanted_of(
    engine: Engine,
    max_new_tokens: int,
    *,
    sampler: Sampler = Sampler(),  # noqa: B008 - frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    logits: bool = False,
    answer_alone: bool = False,
    on_tokens: OnTokens | None = None,
) -> Wanted:
    """The options of ``Session.start``, refused in words before anything runs."""
    check_value("stop_ids", stop_ids, list, tuple, type(None))
    if on_tokens is not None and not callable(on_tokens):
        raise UserError(f"on_tokens is {on_tokens!r:.60}; it must be callable with (request, ids)")
    stops = engine.stop_ids if stop_ids is None else tuple(stop_ids)
    return Wanted(max_new_tokens, sampler, seed, stops, logits, answer_alone)


@dataclass(frozen=True)
class Answer:
    """What one request got, and what it cost. Times are of the requests served together; compilation is apart."""

    text: str
    tokens: list[int]
    method: AttentionMethod
    document_tokens: int
    query_tokens: int
    prefill_s: float
    """Document prefill: from the first layer to the last shard's KV being there."""
    query_s: float
    """Query phase up to the logits of the first answer token."""
    decode_s: float
    decode_steps: int
    """Decoding steps that ran: one a token after the first, of the longest answer of the batch."""
    compile_s: float
    finish_reason: str
    """"stop" where a stop id ended the answer, "length" where it had its tokens."""
    notes: tuple[str, ...] = ()
    query_logits: np.ndarray | None = field(default=None, repr=False)
    """float32 [query tokens, V], on request."""
    step_logits: np.ndarray | None = field(default=None, repr=False)
    """float32 [answer tokens, V]: row t is what token t was taken from; on request."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Document tokens over prefill time."""
        return self.document_tokens / self.prefill_s

    @property
    def decode_ms_per_token(self) -> float | None:
        """Mean over the decoding steps that ran; None where there was none."""
        return 1e3 * self.decode_s / self.decode_steps if self.decode_steps else None


@dataclass(frozen=True)
class QueryPhase:
    """Query rows over the cache: logits, the tail that holds their KV, and the lengths with theirs."""

    logits: jax.Array
    tail: TailCache
    lengths: Lengths


def run_query(session: Session, queries: list[np.ndarray], new_tokens: int, plan: DecodePlan) -> QueryPhase:
    """The query phase with room for ``new_tokens`` more."""
    programs = session.engine.programs
    rows = bucket(max(len(q) for q in queries))
    ids = np.zeros((len(queries), rows), np.int32)
    for b, asked in enumerate(queries):
        ids[b, : len(asked)] = asked
    counts = programs.place(np.asarray([len(q) for q in queries], np.int32))
    lengths = replace(session.lengths, query_tokens=counts, segments=())
    tail = programs.zeros(TailCache, len(queries), rows + bucket(new_tokens), session.engine.model.dtype)
    weights, cache, tokens = session.engine.state, session.cache, programs.place(ids)
    if isinstance(cache, HostCache):
        logits, tail = Steps(programs, plan, weights, cache).query(tokens, lengths, tail)
    else:
        logits, tail = query(programs, plan, weights, tokens, lengths, cache, tail)
    return QueryPhase(logits, tail, lengths)


class Generation:
    """One answer for every request of a session; ``step`` until ``finished``, then ``answers``."""

    def __init__(self, session: Session, queries: list[np.ndarray], wanted: Wanted, on_tokens: OnTokens | None) -> None:
        """Runs the query phase and takes every request's first token."""
        self.session, self.queries, self.wanted, self.on_tokens = session, queries, wanted, on_tokens
        engine, programs = session.engine, session.engine.programs
        self.compiled_before = programs.compile_s
        self.plan = DecodePlan.of(session.method, greedy=wanted.sampler.greedy, with_logits=wanted.logits)
        started = time.perf_counter()
        engine.progress("query", 0, 1)
        whole = wanted.logits and not wanted.answer_alone
        asking = replace(self.plan, greedy=True, with_logits=whole, bottom_right=engine.settings.bottom_right_query)
        phase = run_query(session, queries, wanted.new_tokens, asking)
        self.query_rows = np.asarray(phase.logits)
        self.query_s = time.perf_counter() - started - (programs.compile_s - self.compiled_before)
        check_finite(session, [self.query_rows[b, : len(q) if whole else 1] for b, q in enumerate(queries)])
        ends = [len(q) - 1 if whole else 0 for q in queries]
        self.step_rows = [np.stack([self.query_rows[b, end] for b, end in enumerate(ends)])[None]]
        key, draw = jax.random.split(jax.random.key(wanted.seed))
        first = np.asarray(wanted.sampler(jnp.asarray(self.step_rows[0][0]), draw))
        self.stopped = np.isin(first, np.asarray(wanted.stop_ids, np.int32))
        self.tokens: list[list[int]] = [[] for _ in queries]
        self.made, self.decode_s, self.decode_compile_s = 1, 0.0, 0.0
        self._collect(np.where(self.stopped, -1, first)[:, None])
        temperature, top_p = map(np.float32, wanted.sampler.settings)
        place = programs.place
        self.asked = Asked(
            phase.lengths, place(wanted.stops), place(np.int32(wanted.new_tokens)), place(temperature), place(top_p)
        )
        self.state = DecodeState(
            place(first), place(self.stopped), place(np.int32(1)), place(jax.random.key_data(key)), phase.tail
        )

    @property
    def finished(self) -> bool:
        """Whether every request met a stop id or has its tokens."""
        return self.made >= self.wanted.new_tokens or bool(self.stopped.all())

    def step(self) -> None:
        """One chunk of tokens for every request that goes on."""
        engine, programs = self.session.engine, self.session.engine.programs
        compiled, started = programs.compile_s, time.perf_counter()
        engine.progress("decode", self.made, self.wanted.new_tokens)
        cache = self.session.cache
        told: np.ndarray | jax.Array
        rows: np.ndarray | jax.Array
        if isinstance(cache, HostCache):
            told, rows, self.state = Steps(programs, self.plan, engine.state, cache).decode(self.asked, self.state)
        else:
            told, rows, self.state = decode(programs, self.plan, engine.state, cache, self.asked, self.state)
        new = np.asarray(told)
        made = int(self.state.made)
        if self.wanted.logits:
            self.step_rows.append(np.asarray(rows)[: made - self.made])
        self.made, self.stopped = made, np.asarray(self.state.done)
        self.decode_compile_s += programs.compile_s - compiled
        self.decode_s += time.perf_counter() - started - (programs.compile_s - compiled)
        self._collect(new)
        if self.finished:
            engine.progress("decode", self.wanted.new_tokens, self.wanted.new_tokens)

    def _collect(self, new: np.ndarray) -> None:
        """Append new ids [B, Q] (-1: nothing) to each request's tokens and tell the listener.

        Raises:
            UserError: a step's logits are not finite; what came before has been told.
        """
        for b, row in enumerate(new):
            fresh = [int(t) for t in row if t >= 0]
            self.tokens[b].extend(fresh)
            if fresh and self.on_tokens:
                self.on_tokens(b, fresh)
        for b, row in enumerate(new):
            if (row == BROKEN).any():
                raise UserError(not_finite(self.session, b, f"after {len(self.tokens[b])} tokens of the answer"))

    def answers(self) -> list[Answer]:
        """What each request got."""
        session, codec = self.session, self.session.engine.codec
        whole = self.wanted.logits and not self.wanted.answer_alone
        steps = np.concatenate(self.step_rows) if self.wanted.logits else None
        compile_s = session.compile_s + session.engine.programs.compile_s - self.compiled_before
        return [
            Answer(
                text=codec.decode(tokens) if codec else "",
                tokens=tokens,
                method=session.method,
                document_tokens=len(session.prompts[b].document),
                query_tokens=len(self.queries[b]),
                prefill_s=session.prefill_s,
                query_s=self.query_s,
                decode_s=self.decode_s,
                decode_steps=self.made - 1,
                compile_s=compile_s,
                finish_reason="stop" if self.stopped[b] else "length",
                notes=session.notes,
                query_logits=self.query_rows[b, : len(self.queries[b])] if whole else None,
                step_logits=None if steps is None else steps[: len(tokens), b],
            )
            for b, tokens in enumerate(self.tokens)
        ]


def teacher_forced(session: Session, continuation: Sequence[Sequence[int]] | None) -> list[np.ndarray]:
    """Logits float32 [query + continuation tokens, V] of each request with a given answer."""
    given = continuation if continuation is not None else [[] for _ in session.prompts]
    check_value("continuation", given, list, tuple)
    if len(given) != len(session.prompts):
        raise UserError(f"{len(session.prompts)} documents and {len(given)} continuations; give one each")
    rows = [as_ids(ids, "continuation") for ids in given]
    for ids in rows:
        session.engine.check_ids("continuation", ids)
    queries = [np.concatenate([p.query, ids]) for p, ids in zip(session.prompts, rows, strict=True)]
    session.engine.check_lengths(session.prompts, queries)
    plan = DecodePlan.of(session.method, with_logits=True, bottom_right=session.engine.settings.bottom_right_query)
    host = np.asarray(run_query(session, queries, 1, plan).logits)
    logits = [host[b, : len(ids)] for b, ids in enumerate(queries)]
    check_finite(session, logits)
    return logits


def check_finite(session: Session, logits: Sequence[np.ndarray]) -> None:
    """UserError where logits of a request hold NaN or infinity: an answer drawn from them would mean nothing."""
    for b, rows in enumerate(logits):
        if not np.isfinite(rows).all():
            raise UserError(not_finite(session, b, "behind the query"))


def not_finite(session: Session, request: int, where: str) -> str:
    """What is said about such logits: the weights were finite when they were read, so the sums were too large."""
    model, of = session.engine.model, f" of request {request}" if len(session.prompts) > 1 else ""
    return (
        f"the logits{of} {where} hold NaN or infinity, so there is no answer: {model.name} leaves the range of "
        f"{model.dtype.name} on these {len(session.prompts[request].document)} document tokens; look at its weights "
        "and rope, or try --dtype float32"
    )

"""What is measured on the device: greedy answers, likelihood of a text's end, agreement with full attention."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.full import Full
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.registry import MethodSpec
from apb_jax.decode import DecodePlan
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.generation import run_query
from apb_jax.mesh import make_mesh
from apb_jax.model.config import with_string, with_yarn
from apb_jax.session import Session
from apb_jax.weights.checkpoint import HFFolder, LoadedModel, parse_dtype
from benchmarks.evidence.samples import Sample
from benchmarks.evidence.units import Unit

ANSWER_ROWS = 32
"""Tokens of full attention's answer that a receipt reads."""
EMBEDDED = 32
"""Tokens at the end of a text that stand for its question, where a method wants one."""
SPARE = 128
"""Positions beyond the model's that a batch may write: an answer is cut at its own task's budget, before them."""


def load_bare(file: Path, heads: Path | None, dtype: str | None) -> LoadedModel:
    """A model without a tokenizer."""
    source, config, hidden = HFFolder.open(file, heads)
    return LoadedModel(file.stem, config, parse_dtype(dtype), hidden, source, None, file)


def under_rope(model: LoadedModel, rope: str, length: int) -> LoadedModel:
    """The model under the ropes of a unit, with positions for its length."""
    config = model.config
    for part in filter(None, rope.split("+")):
        kind, _, value = part.partition(":")
        config = with_yarn(config, float(value)) if kind == "yarn" else with_string(config, int(value))
    return replace(model, config=replace(config, max_positions=max(config.max_positions, length) + SPARE))


class Engines:
    """The engine of a unit; models share nothing but their file, methods of one model share weights and programs."""

    def __init__(self, file: Path, heads: Path | None, dtype: str | None) -> None:
        self.file, self.heads, self.dtype = file, heads, dtype
        self.base = cache(self._base)

    def _base(self, with_heads: bool, rope: str, length: int) -> Engine:
        model = load_bare(self.file, self.heads if with_heads else None, self.dtype)
        return Engine(under_rope(model, rope, length), "full", make_mesh(sp=1))

    def of(self, unit: Unit) -> Engine:
        """On one device, with as many virtual shards as the method needs to be itself."""
        if unit.rope and self.base.cache_info().currsize > 2:
            self.base.cache_clear()
        base = self.base(unit.needs_heads, unit.rope, unit.length if unit.rope or unit.length > 8192 else 0)
        options = dict(unit.options)
        if unit.kind == "text" and "query_at" in options:
            options["query_at"] = 0
        spec = MethodSpec(unit.method, options)
        return base.with_method(spec, shards=spec.shards_on(1))


def prompt_of(sample: Sample, length: int) -> Prompt:
    """The request of a sample; a text is cut from its start to ``length`` tokens."""
    if sample.kind != "text":
        return Prompt(sample.document, sample.query, sample.embedded)
    document = sample.document[len(sample.document) + len(sample.query) - length :]
    return Prompt(document, sample.query, document[-EMBEDDED:])


def logits_of(session: Session, queries: list[np.ndarray]) -> Float[Array, "B R V"]:
    """Logits of all query rows, on the device; rows past a request's own mean nothing."""
    return run_query(session, queries, 1, DecodePlan.of(session.method, with_logits=True)).logits


def packed(tokens: Sequence[int]) -> str:
    """Token ids as text: 16 bits each, base 64."""
    return base64.b64encode(np.asarray(tokens, "<u2").tobytes()).decode()


def unpacked(text: str) -> list[int]:
    """The ids of ``packed``."""
    return np.frombuffer(base64.b64decode(text), "<u2").astype(int).tolist()


def answers(
    engine: Engine, samples: Sequence[Sample], length: int, stop: Sequence[int]
) -> tuple[list[dict[str, Any]], str]:
    """Greedy answers, as ids."""
    session = engine.prefill([prompt_of(sample, length) for sample in samples])
    given = session.generate(max(sample.new_tokens for sample in samples), stop_ids=stop)
    rows = [{"tokens": packed(a.tokens[: sample.new_tokens])} for sample, a in zip(samples, given, strict=True)]
    return rows, _ran(session)


@jax.jit
def _nll(logits: Float[Array, "B R V"], targets: Int[Array, "B T"]) -> Float[Array, " B"]:
    rows = logits[:, : targets.shape[1]].astype(jnp.float32)
    chosen = jnp.take_along_axis(rows, targets[..., None], axis=2)[..., 0]
    return (jax.nn.logsumexp(rows, axis=-1) - chosen).mean(axis=1)


def likelihood(engine: Engine, samples: Sequence[Sample], length: int) -> tuple[list[dict[str, Any]], str]:
    """Mean negative log-likelihood in nats of the query's tokens from the second on."""
    session = engine.prefill([prompt_of(sample, length) for sample in samples])
    logits = logits_of(session, [sample.query[:-1] for sample in samples])
    found = _nll(logits, jnp.asarray(np.stack([sample.query[1:] for sample in samples])))
    return [{"nll": round(float(x), 6)} for x in np.asarray(found)], _ran(session)


@jax.jit
def _agreement(
    ours: Float[Array, "B R V"], theirs: Float[Array, "B R V"], start: Int[Array, " B"], end: Int[Array, " B"]
) -> dict[str, Float[Array, " B"]]:
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (theirs, ours))
    kl, same = (jnp.exp(p) * (p - q)).sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)
    row = jnp.arange(kl.shape[1])[None]
    everything, answer = row < end[:, None], (row >= start[:, None] - 1) & (row < end[:, None])

    def mean(x: Array, where: Array) -> Array:
        rows = where.astype(jnp.float32)
        return (x.astype(jnp.float32) * rows).sum(axis=1) / jnp.maximum(rows.sum(axis=1), 1.0)

    return {
        "kl": mean(kl, everything),
        "kl_max": jnp.where(everything, kl, 0.0).max(axis=1),
        "top1": mean(same, everything),
        "kl_answer": mean(kl, answer),
        "top1_answer": mean(same, answer),
        "kl_first": jnp.take_along_axis(kl, start[:, None] - 1, axis=1)[:, 0],
    }


def receipts(
    engine: Engine, reference: Engine, samples: Sequence[Sample], length: int, stop: Sequence[int]
) -> tuple[list[dict[str, Any]], str]:
    """Agreement with full attention over the rows of the query and of full attention's answer (teacher forcing).

    Beside it both answers in full, so that a lost answer is known from the same row.
    """
    prompts = [prompt_of(sample, length) for sample in samples]
    most = max(sample.new_tokens for sample in samples)
    session = reference.prefill(prompts)
    given = session.generate(most, stop_ids=stop)
    queries = [np.asarray([*p.query, *a.tokens[:ANSWER_ROWS]], np.int32) for p, a in zip(prompts, given, strict=True)]
    theirs = logits_of(session, queries)
    del session
    ours_session = engine.prefill(prompts)
    own = ours_session.generate(most, stop_ids=stop)
    ours = logits_of(ours_session, queries)
    start, end = (np.asarray([len(x) for x in rows], np.int32) for rows in ([p.query for p in prompts], queries))
    found = {name: np.asarray(x) for name, x in _agreement(ours, theirs, start, end).items()}
    rows = [
        {
            **{name: round(float(x[b]), 6) for name, x in found.items()},
            "tokens": packed(own[b].tokens[: sample.new_tokens]),
            "full_tokens": packed(given[b].tokens[: sample.new_tokens]),
        }
        for b, sample in enumerate(samples)
    ]
    return rows, _ran(ours_session)


def _ran(session: Session) -> str:
    """The method that really ran, in its own words; refused where it fell back to full attention."""
    if isinstance(session.method, Full) and any("falls back" in note for note in session.notes):
        raise UserError("; ".join(session.notes))
    notes = [note for note in session.notes if "training-free" not in note]
    return ("full" if isinstance(session.method, Full) else repr(session.method)) + "".join(f"; {n}" for n in notes)

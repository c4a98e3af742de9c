"""A run beside others: each method prefills, is timed, answers and is freed before the next one starts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.engine import Engine
from apb_jax.generation import Answer, OnTokens, Wanted
from apb_jax.measure.receipt import receipt
from apb_jax.measure.recovered import recovered_mass
from apb_jax.measure.traffic import layer_traffic
from apb_jax.report import describe
from apb_jax.sampling import Sampler


@dataclass(frozen=True)
class Asking:
    """What every method of a comparison is asked for with."""

    prompt: Prompt
    new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    truth: str | None = None
    repeat: int = 1
    """Timed prefills after the first one, which compiles; 0: the first one counts."""
    alone: bool = True
    """Whether no other method runs in this process, so that the devices' own peak is this method's."""
    mass: bool = True
    """Whether the recovered attention mass is measured: one more prefill with twice the attention."""


def run_one(engine: Engine, asking: Asking, on_tokens: OnTokens | None = None) -> tuple[dict[str, Any], Answer]:
    """Prefill and answer: (this method's part of the JSON object, the answer). Nothing stays on the devices."""
    engine.programs.largest = 0
    stops = engine.stop_ids if asking.stop_ids is None else asking.stop_ids
    session = engine.prefill([asking.prompt], Wanted(asking.new_tokens, asking.sampler, stop_ids=stops))
    (answer,) = session.generate(
        asking.new_tokens, sampler=asking.sampler, seed=asking.seed, stop_ids=asking.stop_ids, on_tokens=on_tokens
    )
    return describe(session, answer, asking.truth, alone=asking.alone), answer


def timed(engine: Engine, asking: Asking, result: dict[str, Any]) -> None:
    """Time the prefill again, warm; the median replaces the first figure, every run is kept."""
    if not asking.repeat:
        return
    runs = []
    for number in range(asking.repeat):
        engine.progress("prefill, timed", number, asking.repeat)
        runs.append(engine.prefill([asking.prompt]).prefill_s)
    engine.progress("prefill, timed", asking.repeat, asking.repeat)
    seconds = statistics.median(runs)
    result |= {
        "prefill_runs_s": runs,
        "prefill_s": seconds,
        "prefill_tokens_per_s": result["document_tokens"] / seconds,
    }


def measured(engine: Engine, asking: Asking, result: dict[str, Any], answers: Sequence[Answer]) -> list[np.ndarray]:
    """Traffic and recovered mass into ``result``; logits of the query followed by each of ``answers``."""
    session = engine.prefill([asking.prompt])
    engine.progress("traffic", 0, 1)
    moved = layer_traffic(engine, session.method, [asking.prompt])
    result |= {
        "collectives_per_layer": moved.collectives,
        "bytes_per_layer": moved.received_bytes,
    }
    logits = []
    for number, answer in enumerate(answers):
        engine.progress("receipt", number, len(answers))
        logits.append(session.logits([answer.tokens])[0])
    engine.progress("receipt", len(answers), len(answers))
    if asking.mass:
        engine.progress("recovered mass", 0, 1)
        mass = recovered_mass(session)
        result["recovered_mass"] = mass.to_json() if mass else None
        engine.progress("recovered mass", 1, 1)
    return logits


def beside(
    engines: Sequence[Engine], asking: Asking, first: tuple[dict[str, Any], Answer], on_start: Any = None
) -> dict[str, Any]:
    """The first method's result with ``compare``: every other engine's, each with a receipt of the first against it.

    The reference's own answer is fed to both (teacher forcing). At most one session is alive at a time.
    """
    result, answer = first
    others: list[dict[str, Any]] = []
    theirs: list[np.ndarray] = []
    answers: list[Answer] = []
    for engine in engines[1:]:
        if on_start:
            on_start(engine)
        other, given = run_one(engine, asking)
        timed(engine, asking, other)
        theirs += measured(engine, asking, other, [given])
        others.append(other)
        answers.append(given)
    if on_start:
        on_start(engines[0])
    timed(engines[0], asking, result)
    ours = measured(engines[0], asking, result, answers)
    for other, logits, reference, given in zip(others, ours, theirs, answers, strict=True):
        other["receipt"] = receipt(logits, reference, answer.tokens, given.tokens).to_json()
        other["speedup"] = other["prefill_s"] / result["prefill_s"]
    return result | {"compare": others}

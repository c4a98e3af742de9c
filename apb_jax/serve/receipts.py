"""The receipt of a question: what the server's method changed against exact attention, as units of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.engine import Engine
from apb_jax.measure.receipt import receipt
from apb_jax.serve.answering import Event, Finished, Progress
from apb_jax.serve.worker import PLACEHOLDER
from apb_jax.session import Session


@dataclass(frozen=True)
class Receipted:
    """A receipt and the two answers' texts."""

    receipt: dict[str, Any]


def exact_method(engine: Engine) -> str:
    """The exact method that runs on so many shards."""
    return "full" if engine.shards == 1 else "ring"


def receipt_units(engine: Engine, session: Session, query: np.ndarray, new_tokens: int) -> Iterator[list[Any]]:
    """Exact attention's prefill of the same document, both answers, and both their logits under the exact one's."""
    document = session.prompts[0].document
    exact = engine.with_method(exact_method(engine))
    reference: Session
    steps = exact.prefill_steps([Prompt(document, PLACEHOLDER, PLACEHOLDER)])
    while True:
        try:
            done, layers = next(steps)
        except StopIteration as finished:
            reference = finished.value
            break
        yield [Progress(len(document), 0, len(document) * done // layers, 0.0, None)]
    answers = []
    for asked in (reference, session):
        generation = asked.start(query.tolist(), new_tokens)
        while not generation.finished:
            yield []
            generation.step()
        answers.append(generation.answers()[0])
        yield []
    fed = [*query.tolist(), *answers[0].tokens]
    rows = []
    for asked in (reference, session):
        rows.append(asked.start(fed, 1, logits=True, stop_ids=()).query_rows[0, : len(fed)])
        yield []
    found = receipt(rows[1], rows[0], answers[1].tokens, answers[0].tokens).to_json()
    found |= {
        "object": "receipt",
        "method": session.method.name,
        "against": reference.method.name,
        "answer": answers[1].text,
        "exact_answer": answers[0].text,
        "prefill_s": session.prefill_s,
        "exact_prefill_s": reference.prefill_s,
    }
    events: list[Event | Receipted] = [Receipted(found), Finished("stop", 0, 0)]
    yield events

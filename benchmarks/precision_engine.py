"""Whole prefills and decoding steps at two precisions beside each other, with the receipt of their logits."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import apb_jax
from apb_jax.measure.receipt import receipt
from apb_jax.precision import Precision
from apb_jax.report import peak_bytes
from apb_jax.task import RANDOM_QUERY_TOKENS

NEW_TOKENS = 64


def engine_at(model: Any, precision: Precision, method: str, shards: int | None) -> apb_jax.Engine:
    """One device, random weights on it."""
    engine = apb_jax.Engine(model, method, apb_jax.make_mesh(1), shards=shards, precision=precision)
    jax.block_until_ready(engine.state)
    return engine


def prompt_of(engine: apb_jax.Engine, seq: int) -> Any:
    """Random ids that with query and answer are ``seq`` tokens."""
    rng = np.random.default_rng(0)
    rows = seq - RANDOM_QUERY_TOKENS - NEW_TOKENS
    vocabulary = engine.model.config.vocab_size
    return engine.prompt(rng.integers(0, vocabulary, rows), rng.integers(0, vocabulary, RANDOM_QUERY_TOKENS))


def measure(
    engine: apb_jax.Engine, method: str, seq: int, repeat: int, forced: list[int] | None, left: Callable[[], float]
) -> tuple[dict[str, Any], np.ndarray]:
    """(figures, logits of the query and of ``forced``, by default its own answer): prefill, decoding, bytes."""
    engine = engine if engine.method.name == method else engine.with_method(method)
    prompt = prompt_of(engine, seq)
    session = engine.prefill([prompt])
    first, compiled = session.prefill_s, session.compile_s
    session.generate(NEW_TOKENS, stop_ids=())
    (answer,) = session.generate(NEW_TOKENS, stop_ids=())
    logits = session.logits([answer.tokens if forced is None else forced])[0]
    del session
    runs: list[float] = []
    for _ in range(repeat):
        if left() > 1.5 * first:
            runs.append(engine.prefill([prompt]).prefill_s)
    peak, source = peak_bytes(engine)
    found = {
        "method": method, "seq": seq, "precision": str(engine.settings.precision) or "bf16",
        "prefill_s": statistics.median(runs) if runs else first, "runs_s": [first, *runs], "compile_s": compiled,
        "decode_ms_per_token": answer.decode_ms_per_token, "query_s": answer.query_s, "tokens": answer.tokens,
        "peak_bytes": peak, "peak_source": source,
        "implementations": {op: sorted(names) for op, names in sorted(engine.programs.choices.items())},
    }  # fmt: skip
    return found, np.asarray(logits)


def compare(found: dict[str, Any], logits: np.ndarray, base: dict[str, Any], base_logits: np.ndarray) -> dict[str, Any]:
    """``found`` with its ratios to ``base`` and the receipt of its logits against it."""
    agreement = receipt(logits, base_logits, found["tokens"], base["tokens"]).to_json()
    return found | {
        "prefill_ratio": base["prefill_s"] / found["prefill_s"],
        "decode_share": found["decode_ms_per_token"] / base["decode_ms_per_token"],
        "receipt": agreement,
    }

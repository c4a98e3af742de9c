"""Perplexity of long text, for the full model and for each method's prefill.

A token is scored by the model's next-token distribution after a prefix that went through the method's prefill, in
windows: prefix [0, s) is the document, the tokens s .. s + window - 1 are scored with exact causal attention over
what the method kept of the prefix. Two protocols:

- ``minference``: every position that MInference's program scores (all but the first of every 10,000 tokens); the
  perplexity of a row is exp of its mean NLL, the figure the plain mean of the rows' perplexities.
- ``tail``: the last ``window`` tokens of each length only: one prefill a row and length. Another metric, another name.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from evals.base import EvalError, LogProbs, require_choice, text_facts
from evals.runner import what_ran
from evals.store import RunFolder
from evals.tokens import Tokens

PROTOCOLS = ("tail", "minference")
CHUNK = 10_000


@dataclass(frozen=True)
class PerplexityPlan:
    """Which tokens of which texts are scored.

    Attributes:
      texts: name -> text; a text with fewer tokens than a length is left out there, and counted.
      lengths: tokens read of each text.
      window: scored tokens per prefill.
    """

    tokens: Tokens
    texts: Mapping[str, str]
    lengths: tuple[int, ...]
    window: int = 512
    protocol: str = "tail"

    def __post_init__(self) -> None:
        require_choice("perplexity protocol", self.protocol, PROTOCOLS)
        if self.window < 1:
            raise EvalError(f"--window must be at least 1, got {self.window}")
        if not self.texts:
            raise EvalError("perplexity needs at least one text")
        shortest = min(self.lengths)
        if shortest <= self.window and self.protocol == "tail":
            raise EvalError(
                f"--window {self.window} leaves no document at length {shortest}; use --window {shortest // 2}"
            )

    def describe(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            "window": self.window,
            "data": [text_facts(name, self.texts[name]) for name in sorted(self.texts)],
            "lengths": list(self.lengths),
            "precision": "log-softmax, sum and exp in float32",
        }

    def windows(self, length: int) -> Iterator[tuple[int, list[int]]]:
        """(start, scored positions) of each window: positions ``start .. start + len - 1`` after ``start`` tokens."""
        if self.protocol == "tail":
            start = length - self.window
            yield start, list(range(start, length))
            return
        for start in range(1, length, self.window):
            positions = range(start, min(length, start + self.window))
            yield start, [p for p in positions if not _chunk_head(p, length)]


def _chunk_head(position: int, length: int) -> bool:
    return length > CHUNK and position % CHUNK == 0


def run_perplexity(
    scorer: LogProbs, plan: PerplexityPlan, folder: RunFolder, *, console: Console, label: str
) -> dict[str, Any]:
    """Score every text at every length; rows are (text, length), resumable."""
    for length in plan.lengths:
        if scorer.max_length is not None and length > scorer.max_length:
            raise EvalError(f"perplexity: {length} tokens exceed the model's {scorer.max_length} positions")
    if not folder.done and all(len(plan.tokens.encode(t)) < min(plan.lengths) for t in plan.texts.values()):
        raise EvalError(f"perplexity: every text is shorter than {min(plan.lengths)} tokens; give longer --text files")
    jobs = [(name, length) for length in sorted(plan.lengths) for name in plan.texts]
    for name, length in track(
        jobs, description=label, console=console, transient=True, disable=not console.is_terminal
    ):
        if ("perplexity", length, name) in folder.done:
            continue
        ids = list(plan.tokens.encode(plan.texts[name]))
        row = {"task": "perplexity", "length": length, "id": name}
        if len(ids) < length:
            folder.append({**row, "nll": None, "scored": 0, "note": f"text has {len(ids)} tokens"})
            continue
        started = time.perf_counter()
        total, scored, ran = _nll(scorer, plan, ids[:length])
        seconds = time.perf_counter() - started
        folder.append({**row, "nll": total / scored, "scored": scored, "seconds": seconds, "ran": ran})
        folder.write_metrics(summarise(folder, plan))
    metrics = summarise(folder, plan)
    folder.write_metrics(metrics)
    return metrics


def _nll(scorer: LogProbs, plan: PerplexityPlan, ids: list[int]) -> tuple[float, int, dict[str, Any]]:
    """(summed NLL, scored tokens, what ran in the last and longest window)."""
    total, scored, facts = 0.0, 0, {}
    for start, positions in plan.windows(len(ids)):
        end = positions[-1] + 1 if positions else start
        if end == start:
            continue
        answer = scorer.log_probs(ids[:start], ids[start:end])
        facts = dict(answer.facts)
        kept = np.asarray(answer.log_probs, np.float64)[[p - start for p in positions]]
        if not np.isfinite(kept).all():
            raise EvalError(f"perplexity: log-probabilities after {start} tokens are not finite")
        total -= float(kept.sum())
        scored += len(positions)
    return total, scored, facts


def summarise(folder: RunFolder, plan: PerplexityPlan) -> dict[str, Any]:
    """Plain mean over texts of their perplexities, per length."""
    results = []
    for length in sorted(plan.lengths):
        rows = [row for row in folder.done.values() if row["length"] == length]
        values = [math.exp(row["nll"]) for row in rows if row["nll"] is not None]
        if values:
            results.append(
                {
                    "length": length,
                    "perplexity": round(sum(values) / len(values), 4),
                    "texts": len(values),
                    "too_short": len(rows) - len(values),
                    "ran": what_ran([row for row in rows if row["nll"] is not None]),
                }
            )
    if not results and folder.done:
        raise EvalError(f"perplexity: every text is shorter than {min(plan.lengths)} tokens; give longer --text files")
    return {"protocol": plan.protocol, "window": plan.window, "results": results}

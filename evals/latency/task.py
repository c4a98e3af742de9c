"""Latency over lengths: prefill, decode, and speed in the definition of the APB paper.

Timed per repetition, after warm-ups that compile and tune: ``prefill_s`` (document and query through all layers until
the first token's logits are on the host) and ``decode_s`` (the further tokens, past any stop token), both measured by
the system around finished device work; tokenising and building the prompt are outside. Without KV: the document's
layers alone. ``tokens_per_s`` is APB's definition: (prompt + generated tokens) summed over repetitions, divided by the
summed prefill and decode seconds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from evals.base import Completion, EvalError, Generator, Prefiller, text_facts
from evals.runner import what_ran
from evals.store import RunFolder

QUERY = "\n\nWhat is the text above about? Answer in a few words:"


@dataclass(frozen=True)
class LatencyPlan:
    """What is timed.

    Attributes:
      text: repeated until the length is reached.
      lengths: prompt tokens aimed at (the row holds the tokens really sent).
      repeats: timed runs after ``warmups`` untimed ones.
      new_tokens: tokens generated; 1 times the prefill and the query alone.
      kv: whether the document's KV is kept; without it the prefill alone is timed, as MInference's table does.
    """

    text: str
    text_name: str
    lengths: tuple[int, ...]
    repeats: int = 5
    warmups: int = 1
    new_tokens: int = 32
    kv: bool = True

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmups", 0), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise EvalError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")

    def describe(self) -> dict[str, Any]:
        return {
            "data": text_facts(self.text_name, self.text),
            "lengths": list(self.lengths),
            "repeats": self.repeats,
            "warmups": self.warmups,
            "new_tokens": self.new_tokens,
            **({} if self.kv else {"kv": False}),
            "timed": "prefill and query until the first logits; then decoding past any stop token; tokenising excluded"
            if self.kv
            else "the document through all layers; no KV kept, no query, no answer; tokenising excluded",
        }

    def run(self, system: Generator, document: str) -> Completion:
        """One run of what is timed."""
        if self.kv:
            return system.generate(document, QUERY, self.new_tokens, ignore_stop=True)
        if not isinstance(system, Prefiller):
            raise EvalError("latency: this system cannot prefill without keeping KV; drop --no-kv")
        return system.prefill_alone(document, QUERY)


def document_of(text: str, query: str, length: int, count: Callable[[str], int]) -> str:
    """The text repeated and cut, by words, to the longest document that makes at most ``length`` prompt tokens."""
    words = text.split(" ")
    room = length - count(query)
    if room < 1:
        raise EvalError(f"latency: length {length} is too short, the query alone has {count(query)} tokens")

    def first(number: int) -> str:
        return " ".join((words * (-(-number // len(words))))[:number])

    lower, upper = 1, 2
    while count(first(upper)) <= room:
        lower, upper = upper, upper * 2
    while upper - lower > 1:
        middle = (lower + upper) // 2
        if count(first(middle)) <= room:
            lower = middle
        else:
            upper = middle
    return first(lower)


def run_latency(
    system: Generator, plan: LatencyPlan, folder: RunFolder, *, console: Console, label: str
) -> dict[str, Any]:
    """Time every length; rows are (length, repetition), resumable by length."""
    for length in plan.lengths:
        if system.max_length is not None and length + plan.new_tokens > system.max_length:
            raise EvalError(
                f"latency: {length} prompt and {plan.new_tokens} new tokens exceed the model's {system.max_length} "
                f"positions; the longest legal length is {system.max_length - plan.new_tokens}"
            )
    for length in sorted(plan.lengths):
        keys = [("latency", length, repeat) for repeat in range(plan.repeats)]
        if all(key in folder.done for key in keys):
            continue
        document = document_of(plan.text, QUERY, length, system.count)
        for _ in range(plan.warmups):
            plan.run(system, document)
        for key in track(
            keys, description=f"{label} {length}", console=console, transient=True, disable=not console.is_terminal
        ):
            if key in folder.done:
                continue
            answer = plan.run(system, document)
            if answer.prefill_s is None or answer.decode_s is None:
                raise EvalError("latency: this system reports no times")
            folder.append(
                {
                    "task": "latency",
                    "length": length,
                    "id": key[2],
                    "prompt_tokens": answer.prompt_tokens,
                    "generated_tokens": answer.generated_tokens,
                    "prefill_s": answer.prefill_s,
                    "decode_s": answer.decode_s,
                    "ran": dict(answer.facts),
                }
            )
        folder.write_metrics(summarise(folder, plan))
    metrics = summarise(folder, plan)
    folder.write_metrics(metrics)
    return metrics


def summarise(folder: RunFolder, plan: LatencyPlan) -> dict[str, Any]:
    results = []
    for length in sorted(plan.lengths):
        rows = [row for row in folder.done.values() if row["length"] == length]
        if rows:
            results.append({"length": length, **_figures(rows), "ran": what_ran(rows)})
    return {"results": results}


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    prefill = [row["prefill_s"] for row in rows]
    later = sum(max(0, row["generated_tokens"] - 1) for row in rows)
    decode = sum(row["decode_s"] for row in rows)
    tokens = sum(row["prompt_tokens"] + row["generated_tokens"] for row in rows)
    return {
        "prompt_tokens": rows[0]["prompt_tokens"],
        "generated_tokens": rows[0]["generated_tokens"],
        "prefill_s": statistics.fmean(prefill),
        "prefill_min_s": min(prefill),
        "prefill_max_s": max(prefill),
        "decode_ms_per_token": 1e3 * decode / later if later else None,
        "tokens_per_s": round(tokens / (sum(prefill) + decode), 2),
        "repeats": len(rows),
    }


def minference_table(per_method: dict[str, dict[int, float]]) -> str:
    """MInference's end-to-end layout: tab-separated, rows ``<n>K``, prefill seconds with five decimals."""
    lengths = sorted({length for values in per_method.values() for length in values})
    lines = ["\t".join(["", *per_method])]
    for length in lengths:
        cells = [f"{values[length]:.5f}" if length in values else "" for values in per_method.values()]
        lines.append("\t".join([_thousands(length), *cells]))
    return "\n".join(lines) + "\n"


def _thousands(length: int) -> str:
    return f"{length / 1000:g}K" if length % 1000 == 0 else f"{length / 1024:g}K" if length % 1024 == 0 else str(length)

"""Retaining heads from prepared samples, and how well they select on samples kept apart."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from apb_jax.retaining.corpus import Example
from apb_jax.retaining.labels import Sample as Padded
from apb_jax.retaining.labels import trace
from apb_jax.retaining.objective import layer_scores, top_overlap
from apb_jax.retaining.train import Recipe, hf_heads, padded, train
from apb_jax.weights.checkpoint import LoadedModel
from benchmarks.evidence.samples import Sample

HELD_OUT = 10
"""Every tenth sample is kept apart."""


@dataclass(frozen=True)
class Prepared:
    """Samples of kind ``heads`` as a corpus."""

    samples: tuple[Sample, ...]

    def pieces(self) -> Sequence[Sample]:
        return self.samples

    def example(self, record: Sample, index: int) -> Example:
        return Example(record.document, record.query)


def train_heads(model: LoadedModel, samples: list[Sample], hidden: int, steps: int, out: Path) -> None:
    """Train, measure on the samples kept apart, save in bfloat16 with what was measured."""
    # One answer's length for all: the programs of a step differ by shapes.
    kept = [replace(s, query=s.query[:128]) for s in samples]
    held, taught = kept[::HELD_OUT], [s for i, s in enumerate(kept) if i % HELD_OUT]
    recipe = Recipe(hidden=hidden, steps=steps, warmup=min(100, steps // 4))
    started = time.perf_counter()
    heads, log = train(model, Prepared(tuple(taught)), recipe, None, Console(quiet=True))
    seconds = time.perf_counter() - started
    graph, weights = model.graph(), model.place(None)
    cast = jax.tree.map(lambda w: w.astype(model.dtype), heads)
    found: dict[str, list[float]] = {}
    for sample in held:
        found.setdefault(sample.task, []).append(float(_overlap(graph, weights, cast, shape(sample))))
    overlap = {task: round(float(np.mean(values)), 4) for task, values in found.items()}
    device = jax.devices()[0].device_kind
    card: dict[str, Any] = {
        "recipe": asdict(recipe), "seconds": round(seconds, 1), "device": device, "jax": jax.__version__,
        "trained_on": len(taught), "held_out": {task: len(values) for task, values in found.items()},
        "held_out_overlap": overlap, "log": log[:: max(1, len(log) // 20)] + log[-1:],
    }  # fmt: skip
    tensors = hf_heads(heads)
    save_file(tensors, out, metadata={"format": "pt", "evidence": json.dumps(card)})
    print(f"heads of {hidden}: {steps} steps in {seconds:.0f} s, held-out top-10% overlap {overlap}", flush=True)
    print(f"heads: {out.stat().st_size / 2**20:.2f} MiB, last {log[-1]}", flush=True)


def shape(sample: Sample) -> Padded:
    """A sample as a training step reads it."""
    prompt, answer = sample.document, sample.query
    rows, answer_rows = padded(len(prompt), 256), padded(len(answer), 128)
    tokens = np.zeros((1, rows + answer_rows), np.int32)
    total = len(prompt) + len(answer)
    tokens[0, :total] = np.concatenate([prompt, answer])
    return Padded(jnp.asarray(tokens), jnp.int32(len(prompt)), jnp.int32(total), rows, answer_rows)


@partial(jax.jit, static_argnames=("graph",))
def _overlap(graph: Any, weights: Any, heads: Any, sample: Padded) -> jax.Array:
    traces = trace(graph, weights, sample)
    scores = layer_scores(heads, traces.q, traces.k, traces.v)
    return top_overlap(scores, traces.labels, sample.prompt_tokens).mean()

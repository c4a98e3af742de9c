"""Prefill time of every method on the same random weights, against the bf16 matmul ceiling of the same process.

    python benchmarks/methods.py --model llama3.1-8b --seq 128k --sp 8 --out benchmarks/results
    python benchmarks/methods.py --methods full,ring,ulysses,apb          # fewer rows, in this order

Rows of one device are ``full``, ``streaming`` and ``minference``; the others use ``--sp`` devices. A row is compiled,
run once, then timed ``--repeat`` times; the median is reported. A row whose single layer already takes longer than
``--limit`` / layers is not run whole: its layer time is reported instead. Beside each time stands a parity spot check:
the logits behind the query against those of the first exact row.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prefill_stages import linear_flops, matmul_ceiling

import apb_jax
from apb_jax.arguments import length
from apb_jax.attention import APB, METHODS, AttentionMethod, Kernels, MethodSpec
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout
from apb_jax.attention.star import Star
from apb_jax.attention.streaming import Streaming
from apb_jax.command import Parser, command
from apb_jax.compile_cache import use_compile_cache
from apb_jax.report import versions
from apb_jax.task import RANDOM_QUERY_TOKENS
from apb_jax.weights.checkpoint import LoadedModel, RandomWeights

ROWS = ("full", "ring", "ulysses", "star", "starx", "apb", "streaming", "minference")
ESTIMATED_FIRST = ("minference", "xattention", "starx_sparse", "infllm", "locret")
"""Methods whose layers may be slow: one layer is timed before the whole model is."""


def seen_keys(method: AttentionMethod, layout: Layout, tokens: int, shards: int) -> float | None:
    """Query-key pairs that the busiest device must compute per query head; None where they depend on the data."""
    if method.can.exact:
        return tokens**2 / 2 / shards
    block = layout.block_capacity
    if isinstance(method, APB):
        anchor = method.anchor_tokens
        own = anchor / shards if method.shared_anchor else anchor
        passed = (shards - 1) * method.passing_tokens
        return own * (anchor - own / 2) + block * (anchor + passed) + block**2 / 2
    if isinstance(method, Star) and method.name != "starx_sparse":
        anchor = layout.segments[0][1]
        size = method.block_tokens or block
        return anchor**2 / 2 + block * anchor + block // size * size**2 / 2
    if isinstance(method, Streaming):
        window = min(method.window_tokens, tokens)
        return tokens * window - window**2 / 2 + max(0, tokens - window) * method.sink_tokens
    return None


def one_layer(model: LoadedModel) -> LoadedModel:
    """The same shapes with a single layer."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=1), source=RandomWeights(0))


def timed(engine: apb_jax.Engine, prompt: Prompt, repeat: int) -> list[float]:
    """Prefill seconds of ``repeat`` runs after one that compiles."""
    return [engine.prefill([prompt]).prefill_s for _ in range(repeat + 1)][1:]


@command("python benchmarks/methods.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--seq", type=length, default=131072)
    parser.add_argument("--sp", type=int, default=None, help="devices of the sharded methods (default: all)")
    parser.add_argument("--methods", default=",".join(ROWS), help="comma-separated, in this order")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the model has")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a whole prefill may take")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    use_compile_cache()
    names = args.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    model = apb_jax.load(args.model, weights="random")
    if args.layers:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=args.layers))
    config = model.config
    kernels = Kernels(None if args.kernels == "auto" else args.kernels)
    rng = np.random.default_rng(0)
    tokens = args.seq - RANDOM_QUERY_TOKENS - 1  # and one new token
    ids = [rng.integers(0, config.vocab_size, n) for n in (tokens, RANDOM_QUERY_TOKENS)]
    devices = args.sp or len(jax.devices())
    ceiling = matmul_ceiling(min(args.seq, 20480), config.hidden_size, 2 * config.intermediate_size)
    print(f"bf16 matmul ceiling {ceiling / 1e12:.0f} TFLOP/s, {jax.devices()[0].device_kind}", flush=True)
    engines: dict[tuple[int, int], apb_jax.Engine] = {}
    reference: np.ndarray | None = None
    full_s: float | None = None

    def engine_for(name: str, shards: int, loaded: LoadedModel) -> apb_jax.Engine:
        key = (shards, loaded.config.num_layers)
        if key not in engines:
            engines[key] = apb_jax.Engine(loaded, MethodSpec(name), apb_jax.make_mesh(sp=shards), kernels=kernels)
        return engines[key].with_method(MethodSpec(name))

    for name in names:
        shards = 1 if name == "full" or METHODS[name].can.max_shards == 1 else devices
        row: dict[str, Any] = {"benchmark": "methods", "date": date.today().isoformat(), "method": name}
        limit_layer = args.limit / config.num_layers
        if name in ESTIMATED_FIRST:
            single = engine_for(name, shards, one_layer(model))
            prompt = single.prompt(*ids)
            row["layer_s"] = timed(single, prompt, 1)[0]
            engines.pop((shards, 1))
            del single
            gc.collect()
        whole = row.get("layer_s", 0.0) <= limit_layer
        if whole:
            engine = engine_for(name, shards, model)
            prompt = engine.prompt(*ids)
            method, notes = engine.choose([prompt])
            layout = method.layout([prompt], shards)
            times = timed(engine, prompt, args.repeat)
            seconds = statistics.median(times)
            (answer,) = engine.prefill([prompt]).generate(1, stop_ids=(), logits=True)
            assert answer.query_logits is not None
            last = answer.query_logits[-1].astype(np.float32)
            if reference is None and method.can.exact:
                reference = last
            rows = layout.tokens.shape[2]
            pairs = seen_keys(method, layout, tokens, shards)
            attention = None if pairs is None else 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
            flops = None if attention is None else attention + linear_flops(config, rows)
            full_s = seconds if name == "full" else full_s
            row |= {
                "fields": dataclasses.asdict(method),
                "notes": list(notes),
                "prefill_s": seconds,
                "runs_s": times,
                "rows_per_shard": rows,
                "tflop_busiest_device": None if flops is None else flops / 1e12,
                "percent_of_ceiling": None if flops is None else 100 * flops / seconds / ceiling,
                "over_full_by_devices": None if full_s is None else seconds / (full_s / shards),
                "parity_max_logit_difference": None if reference is None else float(np.abs(last - reference).max()),
                "reference_logit_std": None if reference is None else float(reference.std()),
                "same_first_token": None if reference is None else bool(last.argmax() == reference.argmax()),
            }
        else:
            row |= {"prefill_s": None, "notes": [f"one layer takes {row['layer_s']:.1f} s: not run whole (--limit)"]}
        row |= {
            "devices": shards,
            "device": jax.devices()[0].device_kind,
            "model": args.model,
            "layers": config.num_layers,
            "dtype": model.dtype.name,
            "kernels": args.kernels,
            "document_tokens": tokens,
            "matmul_tflops": ceiling / 1e12,
            "versions": versions(),
        }
        shown = "not run whole" if row["prefill_s"] is None else f"{row['prefill_s']:.3f} s"
        percent = row.get("percent_of_ceiling")
        print(
            f"{name:<12} {shards} x  {shown:>14}  "
            f"{'' if percent is None else f'{percent:.0f}% of ceiling':>16}  "
            f"logits off by {row.get('parity_max_logit_difference')}  {row['notes']}",
            flush=True,
        )
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "methods.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())

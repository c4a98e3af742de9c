"""What a prefill's time is made of: the same run with stages left out, against a matmul ceiling of the same process.

    python benchmarks/prefill_stages.py --model llama3.1-8b --seq 128k --sp 8 --out benchmarks/results
    python benchmarks/prefill_stages.py --seq 128k --sp 8 --whole --kernels mosaic_gpu --against cudnn

Weights are random. Each variant is compiled, run once, then timed ``--repeat`` times; the median is reported.
``--against`` runs the same prompt on other attention kernels too and compares logits and tokens: sampled ones, at
temperature 1 with one seed, because random weights make greedy decoding repeat one token.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import apb_jax
from apb_jax.arguments import length
from apb_jax.attention import APB, AttentionMethod, Full, Kernels, MethodSpec, Prompt
from apb_jax.command import Parser, command
from apb_jax.compile_cache import use_compile_cache
from apb_jax.measure.receipt import receipt
from apb_jax.model.config import ModelConfig
from apb_jax.model.slices import WeightSlices
from apb_jax.report import peak_bytes, size, versions
from apb_jax.sampling import Sampler
from apb_jax.task import RANDOM_QUERY_TOKENS


class NoExchange(APB):
    """APB that neither scores nor exchanges: its passing block and its anchor are its own first keys."""

    def scores(self, x: Any, k: Any, shard: Any) -> Any:
        return jnp.zeros(k.shape[:3], jnp.float32)

    def exchange(self, scores: Any, k: Any, v: Any, shard: Any, *kernels: Any) -> Any:
        slots = (shard.count - 1) * self.passing_tokens
        return None, k[:, :slots], v[:, :slots]

    def exchange_with_anchor(self, scores: Any, k: Any, v: Any, shard: Any, *kernels: Any) -> Any:
        anchor = k[:, : self.anchor_tokens], v[:, : self.anchor_tokens]
        return None, anchor, self.exchange(scores, k, v, shard)[1:]


class LinearOnly(NoExchange):
    """Projections, norms, RoPE and MLP; cache writes."""

    def attend(self, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)


def matmul_ceiling(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of a bf16 product on random data, median of 10."""
    key = jax.random.key(0)
    a = jax.random.normal(key, (rows, inner), jnp.bfloat16)
    b = jax.random.normal(key, (inner, columns), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(5)])
        times.append((time.perf_counter() - started) / 5)
    return 2 * rows * inner * columns / statistics.median(times)


def linear_flops(config: ModelConfig, rows: int) -> float:
    """Projections and MLP of all layers for ``rows`` rows."""
    return 2.0 * config.num_layers * config.layer_parameters * rows


def attention_flops(config: ModelConfig, method: AttentionMethod, block: int, shard: int) -> float:
    """Useful FLOPs of all layers on one shard: 4 D for each query head and visible pair of row and key."""
    anchor = getattr(method, "anchor_tokens", 0) if shard else 0
    passed = shard * getattr(method, "passing_tokens", 0)
    if isinstance(method, Full):
        anchor, passed = 0, shard * block
    own = anchor / (shard + 1) if getattr(method, "shared_anchor", False) else anchor  # of the last shard
    keys = own * (anchor - own / 2) + block * (anchor + passed) + block**2 / 2
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * keys


def sliced_decode(engine: apb_jax.Engine, prompt: Prompt, new_tokens: int) -> float | None:
    """Milliseconds a token where every device reads its part of the weights; None where they do not divide."""
    shards = engine.mesh.shape["sp"]
    if shards == 1 or WeightSlices.why_not(engine.model.config, shards, engine.mesh.shape["tp"]):
        return None
    sliced = engine.with_method(engine.method, slice_decode=True)
    session = sliced.prefill([prompt])
    session.generate(new_tokens, stop_ids=())
    (answer,) = session.generate(new_tokens, stop_ids=())
    print(f"decode with sliced weights {answer.decode_ms_per_token:.2f} ms/token", flush=True)
    return answer.decode_ms_per_token


def compare(engine: apb_jax.Engine, prompt: Prompt, kernels: str, new_tokens: int, repeat: int) -> dict[str, Any]:
    """The engine's kernels beside others in one process: prefill seconds, logits, sampled tokens."""
    others = engine.with_method(engine.method, kernels=Kernels(kernels))
    seconds, sessions, answers = [], [], []
    for current in (engine, others):
        times = [current.prefill([prompt]).prefill_s for _ in range(repeat + 1)][1:]  # one cache at a time
        seconds.append(statistics.median(times))
        sessions.append(current.prefill([prompt]))
        answers.append(sessions[-1].generate(new_tokens, sampler=Sampler(1.0, 1.0), stop_ids=())[0])
    logits = [session.logits([answers[1].tokens])[0] for session in sessions]
    found = receipt(*logits, answers[0].tokens, answers[1].tokens)
    print(
        f"against {kernels}: {seconds[0]:.3f} s and {seconds[1]:.3f} s; {len(set(answers[1].tokens))} different tokens "
        f"of {new_tokens} sampled, {found.greedy_agreement:.0%} the same; first choice of {found.rows} rows "
        f"{found.top1_agreement:.0%} the same, KL mean {found.kl_mean:.2g} max {found.kl_max:.2g} nats",
        flush=True,
    )
    return {
        "kernels": kernels,
        "prefill_s": seconds,
        "sampled_tokens": [answer.tokens for answer in answers],
        "sampled_agreement": found.greedy_agreement,
        "top1_agreement": found.top1_agreement,
        "kl_mean": found.kl_mean,
        "kl_max": found.kl_max,
    }


@command("python benchmarks/prefill_stages.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--seq", type=length, default=131072)
    parser.add_argument("--sp", type=int, default=None)
    parser.add_argument("--shards", type=int, default=None, help="parts of the document (default: one a device)")
    parser.add_argument("--placement", default="contiguous", choices=("contiguous", "zigzag"))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--against", metavar="KERNELS", help="compare logits and tokens with these kernels'")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="time the whole prefill only, no variants")
    parser.add_argument("--full", action="store_true", help="time full attention on this mesh instead of APB's stages")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    use_compile_cache()
    model = apb_jax.load(args.model, weights="random")
    mesh = apb_jax.make_mesh(sp=args.sp)
    kernels = Kernels(None if args.kernels == "auto" else args.kernels)
    started = time.perf_counter()
    engine = apb_jax.Engine(
        model,
        "full" if args.full else "apb",
        mesh,
        kernels=kernels,
        shards=args.shards,
        placement=args.placement,
    )
    jax.block_until_ready(engine.state)
    print(f"weights on the devices in {time.perf_counter() - started:.1f} s", flush=True)
    rng = np.random.default_rng(0)
    rows = args.seq - RANDOM_QUERY_TOKENS - args.new_tokens
    prompt = engine.prompt(
        rng.integers(0, model.config.vocab_size, rows), rng.integers(0, model.config.vocab_size, RANDOM_QUERY_TOKENS)
    )
    method, notes = engine.choose([prompt])
    print(method, *notes, flush=True)
    layout = method.layout([prompt], engine.shards)
    local = layout.tokens.shape[2]
    ceiling = matmul_ceiling(local, model.config.hidden_size, 2 * model.config.intermediate_size)
    variants: dict[str, AttentionMethod | MethodSpec] = {"all": method}
    if isinstance(method, APB) and not args.whole:
        fields = dataclasses.asdict(method)
        variants |= {
            "without scores and exchange": NoExchange(**fields),
            "linear layers only": LinearOnly(**fields),
            "the whole anchor on every shard": dataclasses.replace(method, shared_anchor=False),
        }
    times: dict[str, float] = {}
    for name, variant in variants.items():
        current = engine.with_method(variant)
        found = [current.prefill([prompt]).prefill_s for _ in range(args.repeat + 1)][1:]
        times[name] = statistics.median(found)
        print(f"{name:<31} {times[name]:.3f} s   runs {[round(t, 3) for t in found]}", flush=True)
    session = engine.prefill([prompt])
    session.generate(args.new_tokens, stop_ids=())
    (answer,) = session.generate(args.new_tokens, stop_ids=())
    peak, source = peak_bytes(engine)
    del session
    sliced = None if args.whole else sliced_decode(engine, prompt, args.new_tokens)
    against = compare(engine, prompt, args.against, args.new_tokens, args.repeat) if args.against else None
    held = engine.placement.table  # the busiest device counts
    attention = max(
        sum(attention_flops(model.config, method, layout.block_capacity, int(r)) for r in row) for row in held
    )
    flops = linear_flops(model.config, local * engine.placement.local) + attention
    result = {
        "benchmark": "prefill_stages",
        "date": date.today().isoformat(),
        "device": f"{len(mesh.devices.flat)} x {jax.devices()[0].device_kind}",
        "model": args.model,
        "dtype": model.dtype.name,
        "method": repr(method),
        "kernels": args.kernels,
        "document_tokens": rows,
        "rows_per_shard": local,
        "prefill_s": times,
        "matmul_tflops": ceiling / 1e12,
        "last_shard_tflop": flops / 1e12,
        "percent_of_ceiling": 100 * flops / times["all"] / ceiling,
        "query_s": answer.query_s,
        "sliced_decode_ms_per_token": sliced,
        "decode_ms_per_token": answer.decode_ms_per_token,
        "peak_bytes_per_device": peak,
        "memory_source": source,
        "tokens": answer.tokens,
        "against": against,
        "versions": versions(),
    }
    print(
        f"last shard {flops / 1e12:.0f} TFLOP, {flops / times['all'] / 1e12:.0f} TFLOP/s = "
        f"{result['percent_of_ceiling']:.0f}% of the {ceiling / 1e12:.0f} TFLOP/s of a matmul; "
        f"decode {answer.decode_ms_per_token:.2f} ms/token; peak {size(peak)} ({source})"
    )
    print(json.dumps(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "prefill_stages.jsonl").open("a") as lines:
            lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Planned against measured peak bytes of a device: one prefill (and answer) in a process of its own each.

    python benchmarks/plan_check.py --out benchmarks/results              # llama3.1-8b's shapes, 32K, 128K, 256K
    python benchmarks/plan_check.py --lengths 32k --methods full          # one configuration

Peaks of one process cannot be told apart, so every configuration has its own. What the plan says does not fit is
skipped and said. Weights are made without temporaries (the devices' peak must be the prefill's); their values mean
nothing. Beside the peak stands the compiler's own estimate of the largest program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from apb_jax.arguments import length as parse_length
from apb_jax.command import Parser, command
from apb_jax.options import gpu_memory

TOLERANCE = 0.07
NEW_TOKENS = 16
ROW = "row: "


@dataclasses.dataclass(frozen=True)
class CheapWeights:
    """Weights that no temporary is needed for: every parameter is one fused program of its indices."""

    folded: bool = True

    def place(self, model: Any, shardings: Mapping[str, Any], progress: Any) -> dict[str, Any]:
        import jax
        import jax.numpy as jnp

        def make(path: str, shape: Any) -> Any:
            width = shape.shape[-2] if len(shape.shape) > 1 else 1

            def fill() -> Any:
                if path.endswith("norm"):
                    return jnp.ones(shape.shape, shape.dtype)
                places = [
                    jax.lax.broadcasted_iota(jnp.float32, shape.shape, axis) * (12.9898 + 7.31 * axis)
                    for axis in range(len(shape.shape))
                ]
                return (jnp.sin(sum(places)) * width**-0.5).astype(shape.dtype)

            return jax.block_until_ready(jax.jit(fill, out_shardings=shardings[path])())

        return {path: make(path, shape) for path, shape in model.shapes().items()}


def load_model(name: str, length: int) -> Any:
    """Shapes of a preset with cheap weights and positions for ``length``: bytes do not depend on the rope."""
    import apb_jax

    model = apb_jax.load(name, weights="random")
    config = dataclasses.replace(model.config, max_positions=max(length, model.config.max_positions))
    return dataclasses.replace(model, config=config, source=CheapWeights())


def one(args: argparse.Namespace) -> None:
    """Plan, run and compare one configuration in this process; prints a row."""
    import jax
    import numpy as np

    import apb_jax
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.measure.devices import figures_of, memory_limit
    from apb_jax.measure.memory import QUERY_TOKENS, Case
    from apb_jax.measure.plan import plan
    from apb_jax.report import versions

    use_compile_cache()
    length, method = args.lengths[0], apb_jax.MethodSpec(args.methods[0])
    model = load_model(args.model, length)
    shards = method.shards_on(args.sp, args.shards)
    engine = apb_jax.Engine(model, method, apb_jax.make_mesh(args.sp), shards=shards)
    rng = np.random.default_rng(0)
    sizes = (length - QUERY_TOKENS - NEW_TOKENS, QUERY_TOKENS)
    prompt = engine.prompt(*(rng.integers(0, model.config.vocab_size, n) for n in sizes))
    limit = args.gpu_memory or memory_limit(jax.devices())
    kind = jax.devices()[0].device_kind
    found = plan(Case.of(engine), [prompt], limit, NEW_TOKENS, figures=figures_of(kind))
    row = {
        "benchmark": "plan_check", "date": date.today().isoformat(), "device": kind, "versions": versions(),
        "seq": length, **found.to_json(),
    }  # fmt: skip
    if not found.fits:
        print(ROW + json.dumps(row), flush=True)
        return
    engine.programs.largest = 0
    session = engine.prefill([prompt])
    after_prefill = peak(jax.devices()[: args.sp])
    warm, compile_s = session.prefill_s, session.compile_s
    if args.answer:
        (answer,) = session.generate(NEW_TOKENS, stop_ids=())
        compile_s = answer.compile_s
    if args.timed:
        del session
        warm = engine.prefill([prompt]).prefill_s
    whole = peak(jax.devices()[: args.sp])
    row |= {
        "measured_bytes": whole,
        "measured_after_prefill_bytes": after_prefill,
        "compiler_bytes": engine.programs.largest,
        "difference": None if whole is None else found.memory.bytes_per_device / whole - 1,
        "prefill_s": warm,
        "compile_s": compile_s,
        "answered": args.answer,
    }
    print(ROW + json.dumps(row), flush=True)


def peak(devices: list[Any]) -> int | None:
    """The fullest device's peak; None where devices do not say (CPUs)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((p for p in peaks if p is not None), default=None)


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    gib = lambda count: f"{count / 2**30:6.2f}"  # noqa: E731
    head = f"{row['method']:<6} {row['seq']:>8}  planned {gib(row['bytes_per_device'])} GiB"
    if not row["fits"]:
        return f"{head}  skipped: {gib(row['limit_bytes'])} GiB are there; {' or '.join(row['would_fit'])}"
    parts = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in row["components"].items())
    seconds = "" if row["seconds"] is None else f" (planned {row['seconds']:.2f})"
    timing = f"prefill {row['prefill_s']:.2f} s{seconds}"
    compiled = f"compiler {gib(row['compiler_bytes'])}"
    if row["measured_bytes"] is None:
        return f"{head}  {compiled}  {timing}  this device tells no peak\n       {parts}"
    verdict = "within" if abs(row["difference"]) <= TOLERANCE else "OUTSIDE"
    measured = f"measured {gib(row['measured_bytes'])} ({gib(row['measured_after_prefill_bytes'])} after prefill)"
    verdict = f"{row['difference']:+.1%} {verdict} {TOLERANCE:.0%}"
    return f"{head}  {measured}  {verdict}  {compiled}  {timing}\n       {parts}"


@command("python benchmarks/plan_check.py")
def main(argv: list[str]) -> int:
    """Exit status 1 where a plan is off by more than TOLERANCE or a configuration died."""
    parser = Parser(description=__doc__)
    lengths = lambda text: [parse_length(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--lengths", type=lengths, default=[2**15, 2**17, 2**18])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["full", "apb"])
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument("--shards", type=int, default=None)
    parser.add_argument("--gpu-memory", type=gpu_memory, default=None)
    parser.add_argument("--answer", action="store_true", help="answer too: query and decoding compile, half a minute")
    parser.add_argument("--timed", action="store_true", help="prefill a second time, warm, for its seconds")
    parser.add_argument("--limit-s", type=float, default=290.0, help="start no configuration after so many seconds")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.one:
        one(args)
        return 0
    from apb_jax.mesh import reserve_memory

    reserve_memory()
    started, rows, died = time.perf_counter(), [], 0
    given = ["--one", "--model", args.model, "--sp", str(args.sp), *(["--timed"] if args.timed else [])]
    given += ["--answer"] if args.answer else []
    given += ["--shards", str(args.shards)] if args.shards else []
    given += ["--gpu-memory", f"{args.gpu_memory >> 20}m"] if args.gpu_memory else []
    for length in args.lengths:
        for method in args.methods:
            if time.perf_counter() - started > args.limit_s:
                print(f"{method:<6} {length:>8}  not run: {args.limit_s:.0f} s are over", flush=True)
                continue
            command = [sys.executable, __file__, *given, "--lengths", str(length), "--methods", method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            row = next((text for text in done.stdout.splitlines() if text.startswith(ROW)), None)
            if row is None:
                died += 1
                print(f"{method:<6} {length:>8}  died with status {done.returncode}: {done.stderr[-600:]}", flush=True)
                continue
            rows.append(json.loads(row.removeprefix(ROW)))
            print(line(rows[-1]), flush=True)
    if args.out and rows:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "plan_check.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    off = [row for row in rows if row.get("difference") is not None and abs(row["difference"]) > TOLERANCE]
    print(f"{len(rows)} rows, {len(off)} off by more than {TOLERANCE:.0%}, {died} died")
    return 1 if off or died else 0


if __name__ == "__main__":
    sys.exit(main())

"""Cold and warm compile seconds of prefill, query and decode: one after the other, and side by side.

    python benchmarks/compile_time.py --out OUT                 # llama3.1-8b's shapes at 128K, apb, at most 120 s
    python benchmarks/compile_time.py --variants serial,parallel

Every variant is a process of its own with its own cache folder: ``serial`` (each program apart, with its seconds),
``parallel`` (what a request does), ``warm`` (``parallel`` again on the cache of ``parallel``), ``autotune0`` and
``autotune2`` (``parallel`` under ``--xla_gpu_autotune_level``). Beside the seconds stand prefill and decode of a
second, warm run: what a lower level costs at run time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from apb_jax.arguments import length
from apb_jax.command import Parser, command

VARIANTS = ("serial", "parallel", "warm", "autotune0", "autotune2")
NEW_TOKENS = 16
ROW = "row: "


def one(args: argparse.Namespace, variant: str) -> None:
    """Compile, run and time one variant in this process; prints a row."""
    from apb_jax.mesh import has_accelerator, reserve_memory, simulate_devices

    reserve_memory() if has_accelerator() else simulate_devices(1)
    import jax
    import numpy as np

    import apb_jax
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.generation import Wanted
    from apb_jax.report import versions
    from apb_jax.task import RANDOM_QUERY_TOKENS

    folder = use_compile_cache()
    model = apb_jax.load(args.model, weights="random")
    spec = apb_jax.MethodSpec(args.method)
    engine = apb_jax.Engine(model, spec, apb_jax.make_mesh(1), shards=spec.shards_on(1))
    jax.block_until_ready(engine.state)
    rng = np.random.default_rng(0)
    sizes = (args.seq - RANDOM_QUERY_TOKENS - NEW_TOKENS, RANDOM_QUERY_TOKENS)
    prompt = engine.prompt(*(rng.integers(0, model.config.vocab_size, n) for n in sizes))
    programs, seconds = engine.programs, {}
    keep = programs.keep

    def timed(key, result):  # type: ignore[no-untyped-def]
        before = programs.compile_s
        keep(key, result)
        seconds[key[0]] = programs.compile_s - before

    programs.keep = timed  # type: ignore[method-assign]
    wanted = None if variant == "serial" else Wanted(NEW_TOKENS)
    engine.prefill([prompt], wanted).generate(NEW_TOKENS, stop_ids=())
    cold = programs.compile_s
    (answer,) = engine.prefill([prompt], wanted).generate(NEW_TOKENS, stop_ids=())
    row = {
        "benchmark": "compile_time", "date": date.today().isoformat(), "device": jax.devices()[0].device_kind,
        "model": args.model, "method": args.method, "seq": args.seq, "variant": variant, "compile_s": cold,
        "waited_by_program_s": seconds, "persistent_cache": folder is not None, "prefill_s": answer.prefill_s,
        "decode_ms_per_token": answer.decode_ms_per_token, "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
    }  # fmt: skip
    print(ROW + json.dumps(row), flush=True)


@command("python benchmarks/compile_time.py")
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--seq", type=length, default=131072)
    parser.add_argument("--method", default="apb")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--limit-s", type=float, default=120.0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.one:
        one(args, args.one)
        return 0
    started, died = time.perf_counter(), 0
    given = ["--model", args.model, "--seq", str(args.seq), "--method", args.method]
    with tempfile.TemporaryDirectory() as cache:
        for variant in args.variants:
            left = args.limit_s - (time.perf_counter() - started)
            if left < 10:
                print(f"{variant:<10} not run: {args.limit_s:.0f} s are over", flush=True)
                continue
            env = dict(os.environ)
            if variant in ("parallel", "warm"):
                env["JAX_COMPILATION_CACHE_DIR"] = cache
            else:
                env["APB_JAX_CACHE"] = "off"
            if variant.startswith("autotune"):
                level = variant.removeprefix("autotune")
                env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_autotune_level={level}".strip()
            call = [sys.executable, __file__, *given, "--one", variant]
            try:
                done = subprocess.run(call, env=env, capture_output=True, text=True, check=False, timeout=left)
            except subprocess.TimeoutExpired:
                print(f"{variant:<10} stopped: {args.limit_s:.0f} s are over", flush=True)
                continue
            row = next((text for text in done.stdout.splitlines() if text.startswith(ROW)), None)
            if row is None:
                died += 1
                print(f"{variant:<10} died with status {done.returncode}: {done.stderr[-600:]}", flush=True)
                continue
            print(row.removeprefix(ROW), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                with (args.out / "compile_time.jsonl").open("a", encoding="utf-8") as file:
                    file.write(row.removeprefix(ROW) + "\n")
    return 1 if died else 0


if __name__ == "__main__":
    sys.exit(main())

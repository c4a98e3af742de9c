"""bf16 beside fp8: the linear layers of a prefill, products of a decoding step, whole engines.

    python -m benchmarks.precision --section linear,skinny --limit-s 120 --out DIR/rows.jsonl
    python -m benchmarks.precision --section engine --limit-s 200 --out FILE
    python -m benchmarks.precision --small            every line on a CPU, to see that it runs

Weights are random. ``linear``: parity of each product against float32, then the seven products of a layer with stages
left out, then layers as the engine runs them (norms, SwiGLU, row chunks; attention left out). ``skinny``: products of a
decoding step, read where they lie. ``engine``: prefill and decoding with the logits' receipt. ``compile``:
layers as XLA compiles them by default, too, which takes longer. Every variant that fails
is told and passed over. One JSON line a figure goes to ``--out``, and
beside it the optimised HLO of the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import apb_jax
from apb_jax.arguments import names
from apb_jax.command import Parser, command
from apb_jax.compile_cache import use_compile_cache
from apb_jax.errors import UserError
from apb_jax.measure.devices import figures_of
from apb_jax.model.config import ModelConfig
from apb_jax.precision import Precision
from apb_jax.presets import MODELS
from apb_jax.report import versions
from benchmarks import precision_engine as engines
from benchmarks import precision_products as parts

SECTIONS = ("linear", "skinny", "engine", "compile")
CUBLAS, FREE = "cuBLAS only", "as XLA likes"
LAYERS = 4
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


class Journal:
    """Prints every figure as it comes, keeps it as a JSON line, watches the clock."""

    def __init__(self, out: Path | None, limit_s: float) -> None:
        self.out, self.limit_s, self.started = out, limit_s, time.perf_counter()
        self.always = {"device": jax.devices()[0].device_kind, "date": date.today().isoformat(), **versions()}
        self.failed = 0
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (time.perf_counter() - self.started)

    def tell(self, line: str, **row: Any) -> None:
        """A line for people; with ``row`` also one of JSON."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {line}", flush=True)
        if row and self.out:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.always | row) + "\n")

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """A variant that fails is told with its error, and the next one follows."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a compiler's error is what the run is to find out
            self.failed += 1
            lines = [line for line in str(error).splitlines() if line.strip()][:6]
            self.tell(f"{what} FAILED: {type(error).__name__}: " + " | ".join(lines)[:1500])
            traceback.print_exc(limit=-3)

    def room(self, what: str, needed: float) -> bool:
        """Whether ``needed`` seconds are left; says what was left out otherwise."""
        if self.left() > needed:
            return True
        self.tell(f"{what} left out: {self.left():.0f} s of the limit remain")
        return False


def linear(journal: Journal, config: ModelConfig, rows: int) -> None:
    """Parity, stages, layers."""
    inputs = parts.Inputs(config, rows)
    with journal.trying("parity"):
        for name, errors in parts.parity(config, inputs).items():
            ok = errors["fp8_arithmetic"] < parts.ARITHMETIC_LIMIT
            journal.tell(
                f"parity {name:<4} against float32: bf16 {errors['bf16']:.2e}, fp8 {errors['fp8']:.2e}; fp8 against "
                f"its own operands in float32 {errors['fp8_arithmetic']:.2e} {'ok' if ok else 'WRONG'}",
                section="linear", what="parity", matrix=name, ok=ok, **errors,
            )  # fmt: skip
    work = parts.flops(config, rows)
    base = None
    for name, (run, args) in parts.stages(config, inputs).items():
        if not journal.room(name, 10):
            continue
        with journal.trying(name):
            program, took = parts.compiled(run, *args, options=parts.CUBLAS_ONLY)
            found = parts.seconds(program, *args)
            base = base or found
            rate = work / found / 1e12
            journal.tell(
                f"{name:<40} {found * 1e3:8.3f} ms  {rate:7.0f} TFLOP/s if products  {base / found:5.2f} x "
                f"(compiled in {took:.1f} s)",
                section="linear", what=name, rows=rows, ms=found * 1e3, tflops=rate, ratio=base / found, compile_s=took,
            )  # fmt: skip
    del inputs
    layers(journal, config, rows, "linear", in_place=False, hows=(CUBLAS,))


def layers(
    journal: Journal, config: ModelConfig, rows: int, section: str, *, in_place: bool, hows: tuple[str, ...]
) -> None:
    """Layers as the engine runs them, bf16 and fp8, with XLA's own generator of products switched off or on."""
    base: dict[str, float] = {}
    for how in hows:
        options = parts.CUBLAS_ONLY if how == CUBLAS else None
        for fp8 in (False, True):
            name = f"layers, {rows} rows, {'fp8' if fp8 else 'bf16'}, {how}"
            if not journal.room(name, 20):
                continue
            with journal.trying(name):
                model = parts.Model(config, LAYERS, fp8)
                call, took, text = model.program(rows, in_place=in_place, options=options)
                if journal.out:
                    journal.out.with_name(f"{name.replace(', ', '_').replace(' ', '_')}.hlo.txt").write_text(text)
                found = parts.seconds(call, calls=20 if in_place else 3) / LAYERS
                base.setdefault(how, found)
                rate = parts.flops(config, rows) / found / 1e12
                nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.state["layers"])) / LAYERS
                journal.tell(
                    f"{name:<45} {found * 1e3:8.4f} ms a layer  {rate:6.0f} TFLOP/s  {nbytes / found / 1e9:6.0f} GB/s "
                    f"of weights  {base[how] / found:5.2f} x (compiled {took:.1f} s); {parts.layer_hlo(model, text)}",
                    section=section, what=name, rows=rows, ms=found * 1e3, ratio=base[how] / found, compile_s=took,
                    hlo=parts.layer_hlo(model, text),
                )  # fmt: skip
                del model, call


def skinny(journal: Journal, config: ModelConfig) -> None:
    """Products of a decoding step: layers as they are, then each group of matrices by implementation and tiles."""
    read = parts.read_ceiling(1 << (32 if jax.default_backend() == "gpu" else 22))
    known = figures_of(jax.devices()[0].device_kind)
    journal.tell(f"reading alone: {read / 1e9:.0f} GB/s", section="skinny", what="read ceiling", gbs=read / 1e9,
                 figures=None if known is None else dataclasses.asdict(known))  # fmt: skip
    shapes = parts.shapes_of(config)
    count = 8
    key = jax.random.key(3)
    for group in (("gate", "up"), ("down",), ("q", "k", "v"), ("o",)):
        wide = [jax.random.normal(key, (count, *shapes[name][::-1]), jnp.bfloat16) for name in group]
        narrow = [jax.jit(lambda a: parts.quantise(a.swapaxes(-1, -2))[0])(a) for a in wide]
        for rows in (1, 16):
            variants: list[tuple[str, Any, Any, str | None]] = [("bf16", wide, None, None), ("fp8", narrow, None, None)]
            if jax.default_backend() == "gpu" and rows > 1 and group in (("gate", "up"), ("down",)):
                variants += [(f"fp8 {name}", narrow, one, None) for name, one in parts.skinny_configs().items()][1:]
            x = jax.random.normal(key, (rows, wide[0].shape[1]), jnp.bfloat16)
            for name, stacks, tiles, implementation in variants:
                what = f"{'+'.join(group)} {rows} row{'s' if rows > 1 else ''} {name}"
                if not journal.room(what, 6):
                    continue
                with journal.trying(what):
                    error = parts.skinny_error(stacks, x, tiles, implementation)
                    run, args = parts.skinny(stacks, x, tiles, implementation)
                    program, took = parts.compiled(run, *args, options=parts.CUBLAS_ONLY)
                    found = parts.seconds(program, *args, calls=10) / count
                    moved = sum(a.nbytes for a in stacks) / count
                    rate = moved / found
                    journal.tell(
                        f"{what:<36} {found * 1e6:7.1f} us  {rate / 1e9:6.0f} GB/s  {rate / read:4.0%} of reading "
                        f"(compiled in {took:.1f} s), off by {error:.1e}",
                        section="skinny", what=what, us=found * 1e6, gbs=rate / 1e9, share=rate / read, error=error,
                    )  # fmt: skip
        del wide, narrow
    layers(journal, config, 1, "skinny", in_place=True, hows=(CUBLAS,))


RECIPES = {"bf16": Precision(), "fp8": Precision.of("fp8"), "fp8 weights": Precision(weights="fp8")}


def engine(journal: Journal, model: Any, lengths: tuple[int, int], asked: argparse.Namespace) -> None:
    """full and apb (8 shards) at the longer length, full at the shorter one, at each of the recipes asked for.

    ``asked.only``: methods at lengths ("full@8192"); none means all.
    """
    short, long = lengths
    cases = (("full", short, None, 2), ("apb", long, 8, 2), ("full", long, None, 1))
    made: dict[str, Any] = {}
    kept: dict[tuple[str, int], Any] = {}
    cost = {"full": 30.0, "apb": 20.0} if jax.default_backend() == "gpu" else {"full": 1.0, "apb": 1.0}
    for method, seq, shards, repeat in cases:
        for word in asked.recipes if not asked.only or f"{method}@{seq}" in asked.only else ():
            name = f"{word:<11} {method:<4} {seq:>7} tokens"
            if not journal.room(name, cost[method] if seq == long else 10):
                continue
            with journal.trying(name):
                if word not in made:
                    made[word] = engines.engine_at(model, RECIPES[word], "full", None)
                    journal.tell(f"{word} weights on the device")
                current = made[word].with_method(method, shards=shards)
                base = kept.get((method, seq))
                forced = base[0]["tokens"] if base else None
                found, logits = engines.measure(current, method, seq, repeat, forced, journal.left)
                if base is None:
                    kept[method, seq] = found, logits
                else:
                    found = engines.compare(found, logits, *base)
                words = (
                    f"{name} prefill {found['prefill_s']:.3f} s (runs {[round(t, 3) for t in found['runs_s']]}, "
                    f"compile {found['compile_s']:.0f} s), decode {found['decode_ms_per_token']:.2f} ms"
                )
                if base:
                    r = found["receipt"]
                    words += (
                        f"; {found['prefill_ratio']:.2f} x, decode {found['decode_share']:.2f} of bf16, KL "
                        f"{r['kl_mean']:.2g}, top-1 {r['top1_agreement']:.0%}, greedy {r['greedy_agreement']:.0%}"
                    )
                journal.tell(words + f"; {found['implementations']}", section="engine", **found)


@command("python -m benchmarks.precision")
def main(argv: list[str]) -> int:
    """Exit status 1 where a variant failed."""
    parser = Parser(description=__doc__)
    parser.add_argument("--section", type=names, default=("linear", "skinny"), help=", ".join(SECTIONS))
    parser.add_argument("--recipes", type=names, default=tuple(RECIPES), help=f"of engines: {', '.join(RECIPES)}")
    parser.add_argument("--only", type=names, default=(), help="methods at lengths of engines: full@8192,apb@131072")
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--rows", type=int, default=20480)
    parser.add_argument("--limit-s", type=float, default=120)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script on a CPU")
    parser.add_argument("--out", type=Path, help="file that JSON lines are appended to")
    args = parser.parse_args(argv)
    use_compile_cache()
    journal = Journal(args.out, args.limit_s)
    journal.tell(", ".join(f"{name} {value}" for name, value in journal.always.items()))
    config = MODELS[args.model].config
    rows, lengths = args.rows, (8192, 131072)
    if args.small:
        config, rows, lengths = dataclasses.replace(config, **SMALL), 256, (512, 1024)
    cases = tuple(
        f"{method}@{seq}" for method, seq in zip(("full", "apb", "full"), (*lengths, lengths[1]), strict=True)
    )
    for name, given, known in (("--recipes", args.recipes, tuple(RECIPES)), ("--only", args.only, cases)):
        if unknown := [word for word in given if word not in known]:
            raise UserError(f"{name} {unknown[0]!r} is unknown; choose of: {', '.join(known)}")
    steps: dict[str, Callable[[], None]] = {
        "linear": lambda: linear(journal, config, rows),
        "skinny": lambda: skinny(journal, config),
        "compile": lambda: layers(journal, config, rows, "compile", in_place=False, hows=(CUBLAS, FREE)),
        "engine": lambda: engine(
            journal, apb_jax.load("tiny" if args.small else args.model, weights="random"), lengths, args
        ),
    }
    for section in args.section:
        with journal.trying(section):
            steps[section]()
    journal.tell(f"done; {journal.failed} variants failed")
    return int(journal.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

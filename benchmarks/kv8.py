"""KV in 8 bits on one GPU: `python -m benchmarks.kv8 --section kernel|sweep|engine [--limit-s 90] [--out FILE]`.

kernel: decode attention over bf16, e4m3 and int8 caches of 8K to 256K keys, 32 query and 8 KV heads of 128; the
error against float32 on the same codes first, then device time (CUPTI), GB/s and the share of a device copy.
sweep: the Triton kernel's tiles at the first of ``--keys``, time alone.
engine: milliseconds a decoded token with Llama-3.1-8B's shapes and random weights, 8K and 128K, full and apb on
8 shards, caches filled with random values (decoding reads them whatever they say), after a real prefill of 8K under
each precision whose logits are compared.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apb_jax.command import Parser, command
from apb_jax.kv_codes import CODES, quantise
from pallas_kernels.decode_attention import Codes, decode_attention
from pallas_kernels.decode_attention import triton as triton_backend
from pallas_kernels.decode_attention.call import make_call
from pallas_kernels.timing import device_ms

HEADS, KV_HEADS, DIM = 32, 8, 128
L2_BYTES = 60e6
KEYS = (131072, 8192, 32768, 262144)
CONFIGS = tuple(
    triton_backend.Config(block, stages, warps, blocks)
    for block, stages, warps, blocks in (
        (64, 4, 4, 2), (128, 3, 4, 2), (128, 2, 4, 3), (128, 4, 4, 2), (128, 2, 4, 2), (256, 2, 8, 1), (64, 4, 4, 3),
        (128, 3, 8, 2),
    )
)  # fmt: skip


class Lines:
    """Prints every row at once and appends it as a JSON line; knows what time is left."""

    def __init__(self, path: Path | None, limit_s: float) -> None:
        self.path, self.end = path, time.perf_counter() + limit_s
        self.common = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def left(self) -> float:
        return self.end - time.perf_counter()

    def row(self, **entry: Any) -> None:
        entry = {**self.common, **entry}
        print(json.dumps(entry), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        """One cell: skipped where the time is over, reported where it fails."""
        if self.left() <= 0:
            return self.row(cell=name, skipped="the time limit")
        try:
            run()
        except Exception as error:  # noqa: BLE001 - the other cells still count
            traceback.print_exc(limit=-4)
            self.row(cell=name, failed=f"{type(error).__name__}: {error}"[:600])


def relative(got: Any, want: Any) -> float:
    """Relative error in the 2-norm."""
    got, want = (jnp.asarray(a, jnp.float32).ravel() for a in (got, want))
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


# ---- kernel --------------------------------------------------------------------------------------------------------


def cache(kind: str, keys: int, seed: int) -> tuple[Any, ...]:
    """k, v and, for 8 bits, their scales of a random cache of one layer."""
    draw = lambda n: jax.random.normal(jax.random.key(seed + n), (1, keys, KV_HEADS, DIM), jnp.bfloat16)  # noqa: E731
    k, v = draw(0), draw(1)
    if kind == "bf16":
        return k, v
    (k, k_scale), (v, v_scale) = (jax.jit(lambda a: quantise(a, CODES[kind]))(a) for a in (k, v))
    return k, v, k_scale, v_scale


def attention(kind: str, name: str | None, config: Any = None, causal: bool = False) -> Callable[..., Any]:
    """The call that is timed; through a stack of one layer, as an engine makes it."""

    def run(q: Any, k: Any, v: Any, *scales: Any) -> Any:
        length = jax.lax.optimization_barrier(jnp.full((1,), k.shape[1], jnp.int32))
        stack = (k[None], v[None])
        if scales:
            stack = tuple(Codes(codes, scale[None]) for codes, scale in zip(stack, scales, strict=True))
        offset = length - q.shape[1] if causal else None
        if config is not None:
            call = make_call(q, *stack, length, offset, None, jnp.int32(0))
            return triton_backend.triton(call, config)
        return decode_attention(q, *stack, length, offset, layer=jnp.int32(0), implementation=name)

    return run


def kernel(lines: Lines, keys_of: tuple[int, ...], sweep: bool) -> None:
    """All cells of the section; with ``sweep`` the Triton kernel's tiles in place of all else."""
    ceiling = 0.0

    def copy() -> None:
        nonlocal ceiling
        x = jnp.ones((2**29,), jnp.float32)
        ceiling = 2.0 * x.nbytes / device_ms(lambda x: x * 2.0, [(x,)]) * 1e-6
        lines.row(section="kernel", cell="copy of 2 GiB", gb_per_s=round(ceiling))

    lines.attempt("copy of 2 GiB", copy)

    def cell(kind: str, name: str, keys: int, rows: int, config: Any = None) -> None:
        size = 2 * keys * KV_HEADS * (2 * DIM if kind == "bf16" else DIM + 4)
        count = max(1, int(3 * L2_BYTES // size) + 1)
        make_q = lambda i: jax.random.normal(jax.random.key(99 + i), (1, rows, HEADS, DIM), jnp.bfloat16)  # noqa: E731
        sets = [(make_q(i), *cache(kind, keys, 10 * i)) for i in range(count)]
        run = attention(kind, name, config, causal=rows > 1)
        started = time.perf_counter()
        out, lse = jax.block_until_ready(jax.jit(run)(*sets[0]))
        compile_s = time.perf_counter() - started
        errors = {}
        if config is None:
            exact = tuple(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in sets[0])
            want, want_lse = jax.jit(attention(kind, "xla", causal=rows > 1))(*exact)
            errors = {"error_out": relative(out, want), "error_lse": relative(lse, want_lse)}
            if kind != "bf16":  # what the codes themselves lose
                plain = (make_q(0), *cache("bf16", keys, 0))
                plain = tuple(a.astype(jnp.float32) for a in plain)
                errors["loss_of_code"] = relative(want, jax.jit(attention("bf16", "xla", causal=rows > 1))(*plain)[0])
        ms = device_ms(run, sets)
        rate = size / ms * 1e-6
        lines.row(
            section="kernel", cell=f"{kind} {name} {keys // 1024}K keys {rows} rows", microseconds=round(1e3 * ms, 2),
            gb_per_s=round(rate), percent_of_copy=round(100 * rate / ceiling, 1) if ceiling else None,
            compile_s=round(compile_s, 1), config=None if config is None else dataclasses.astuple(config), **errors,
        )  # fmt: skip

    for kind in ("fp8", "int8") if sweep else ():
        for config in CONFIGS:
            lines.attempt(f"{kind} {config}", lambda k=kind, c=config: cell(k, "triton", keys_of[0], 1, c))
    if sweep:
        return
    for keys in keys_of:
        for kind, name in (("bf16", "mosaic_gpu"), ("fp8", "triton"), ("int8", "triton")):
            lines.attempt(f"{kind} {keys}", lambda k=kind, n=name, t=keys: cell(k, n, t, 1))
    for kind, name in (("bf16", "mosaic_gpu"), ("fp8", "triton")):
        lines.attempt(f"{kind} query rows", lambda k=kind, n=name: cell(k, n, keys_of[0], 64))
    lines.attempt("fp8 xla", lambda: cell("fp8", "xla", keys_of[0], 1))


# ---- engine --------------------------------------------------------------------------------------------------------


def filled(engine: Any, prompt: Any) -> Any:
    """A session whose cache holds random values: what decoding reads, without the minutes of a prefill."""
    from apb_jax.programs import Lengths
    from apb_jax.session import Session

    method, notes = engine.choose([prompt])
    programs, placement = engine.programs, engine.placement
    layout = method.layout([prompt], placement.shards)
    asked = np.asarray([len(prompt.query)], np.int32)
    empty = programs.document_cache(1, layout.shards * layout.kept_capacity, engine.model.dtype)

    def fill(array: Any) -> Any:
        one = jax.random.normal(jax.random.key(array.ndim), array.shape[1:], jnp.bfloat16)
        one = jnp.abs(one) / 100 if array.dtype == jnp.float32 else one * (1 if array.dtype == jnp.bfloat16 else 40)
        return jnp.broadcast_to(one.astype(array.dtype), array.shape)

    cache = jax.jit(lambda cache: jax.tree.map(fill, cache), donate_argnums=0)(empty)
    lengths = programs.place(Lengths.of(layout, asked, placement))
    return Session(engine, method, layout, [prompt], lengths, jax.block_until_ready(cache), 0.0, 0.0, notes)


def engine(lines: Lines, model_name: str, lengths: tuple[int, ...], kinds: tuple[str, ...], new_tokens: int) -> None:
    """All cells of the section."""
    import apb_jax
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.measure.receipt import receipt
    from apb_jax.precision import Precision

    use_compile_cache()
    started = time.perf_counter()
    model = apb_jax.load(model_name, weights="random")
    first = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1))
    jax.block_until_ready(first.state)
    lines.row(section="engine", cell="weights", seconds=round(time.perf_counter() - started, 1))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (max(lengths),), np.int32)
    engines: dict[Any, Any] = {}

    def engine_of(method: str, kind: str) -> Any:
        if (method, kind) not in engines:
            shards = 8 if method == "apb" else 1
            engines[method, kind] = first.with_method(method, shards=shards, precision=Precision(kv=kind))
        return engines[method, kind]

    def decode(method: str, kind: str, tokens: int) -> None:
        current = engine_of(method, kind)
        prompt = current.prompt(ids[: tokens - 16 - new_tokens], ids[:16])
        session = filled(current, prompt)
        session.generate(new_tokens, stop_ids=())
        answers = [session.generate(new_tokens, stop_ids=())[0] for _ in range(3)]
        ms = statistics.median(answer.decode_ms_per_token for answer in answers)
        lines.row(
            section="engine", cell=f"decode {method} {kind} {tokens}", ms_per_token=round(ms, 3),
            query_s=round(statistics.median(answer.query_s for answer in answers), 4),
            cache_bytes=sum(a.nbytes for a in jax.tree.leaves(session.cache)),
            implementations=sorted(current.programs.choices.get("decode_attention", ())),
        )  # fmt: skip

    def prefilled(method: str, tokens: int) -> None:
        answers = []
        for kind in kinds:
            current = engine_of(method, kind)
            session = current.prefill([current.prompt(ids[: tokens - 64], ids[:16])])
            given = [list(map(int, ids[100:116]))]
            answers.append((kind, session.prefill_s, session.compile_s, session.logits(given)[0]))
        base = answers[0]
        for kind, seconds, compile_s, logits in answers:
            found = receipt(logits, base[3], [], []) if kind != base[0] else None
            lines.row(
                section="engine", cell=f"prefill {method} {kind} {tokens}", prefill_s=round(seconds, 4),
                compile_s=round(compile_s, 1), logits_error=relative(logits, base[3]),
                receipt=None if found is None else dataclasses.asdict(found),
            )  # fmt: skip

    for tokens in sorted(lengths, reverse=True):
        for method in ("full", "apb"):
            for kind in kinds:
                lines.attempt(f"decode {method} {kind} {tokens}", lambda m=method, k=kind, t=tokens: decode(m, k, t))
    for method in ("full", "apb"):
        lines.attempt(f"prefill {method}", lambda m=method: prefilled(m, min(lengths)))


@command("python -m benchmarks.kv8")
def main(argv: list[str]) -> None:
    """See the module's text."""
    parser = Parser(prog="python -m benchmarks.kv8", description=__doc__)
    parser.add_argument("--section", choices=("kernel", "sweep", "engine"), required=True)
    parser.add_argument("--limit-s", type=float, default=90.0, help="no cell is started after so many seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines there")
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS, help="kernel, sweep: lengths")
    parser.add_argument("--model", default="llama3.1-8b", help="engine: its shapes")
    parser.add_argument("--seq", type=int, nargs="+", default=(8192, 131072), help="engine: lengths")
    parser.add_argument("--kinds", nargs="+", default=("model", "fp8"), help="engine: the first is the baseline")
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args(argv)
    lines = Lines(args.out, args.limit_s)
    lines.row(section=args.section, cell="start", python=sys.version.split()[0], devices=len(jax.devices()))
    if args.section in ("kernel", "sweep"):
        kernel(lines, tuple(args.keys), args.section == "sweep")
    else:
        engine(lines, args.model, tuple(args.seq), tuple(args.kinds), args.new_tokens)


if __name__ == "__main__":
    sys.exit(main())

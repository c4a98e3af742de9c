"""Attention with 8-bit products beside the 16-bit kernel and cuDNN: `python -m benchmarks.attention8 [--limit-s 90]`.

For each case and variant, in this order: errors of out and lse against float32 on sampled rows, then the device time
with the quantisation of q, k and v, and of the quantisation alone. Useful TFLOP/s, and the share of the card's dense
8-bit peak. Section `lengths` is the error against float32 by key length, with `--plot` as a picture; without a GPU
it measures the emulation of the same arithmetic. One JSON line a row in --out.

    python -m benchmarks.attention8 --section lengths --plot docs/pictures/attention8_error.png
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from apb_jax.arguments import names
from apb_jax.command import Parser, command
from benchmarks.kernels import DIM, FLASH_CASES, HEADS, KV_HEADS, FlashCase, exact_samples, flash_parity
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.flash_attention.call import make_call
from pallas_kernels.flash_attention.eight_bit import EightBit, quantise_call
from pallas_kernels.flash_attention.mosaic_gpu import Config, mosaic_gpu
from pallas_kernels.timing import device_ms

PEAK_8_BIT = 1979.0
"""TFLOP/s of H100 and H200 SXM, dense, from the vendor's data sheet."""
PERCENT = (0.1, 0.2, 0.5, 1, 2, 5, 10)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SECTIONS = ("kernel", "lengths")
SCORES, BOTH = EightBit(values=False), EightBit()
VARIANTS: tuple[tuple[str, EightBit | None, Config | None], ...] = (
    ("bf16, this kernel", None, None),
    ("e4m3 scores", SCORES, Config(128, 2, 2)),
    ("e4m3 both, promoted", BOTH, Config(128, 2, 2)),
    ("e4m3 both", BOTH, Config(128, 2, 2, promote=False)),
    ("e4m3 both, promoted, 4 stages", BOTH, Config(128, 4, 2)),
    ("e4m3 scores, 3 stages", SCORES, Config(128, 3, 2)),
    ("e4m3 both, promoted, no cluster", BOTH, Config(128, 4, 1)),
    ("e4m3 both, 4 stages", BOTH, Config(128, 4, 2, promote=False)),
)


def quantise_only(q, k, v, rows, eight: EightBit) -> tuple:
    call = make_call(q, k, v, rows, None, eight)
    found = quantise_call(call.q, call.k, call.v, call.rows, call.scale, eight)
    return found.q, found.k, found.v, found.row_scale, found.shift


class Rows:
    """Prints rows and appends them to a file."""

    def __init__(self, out: Path | None):
        self.out, self.start = out, time.perf_counter()
        device = jax.devices()[0].device_kind
        asked = " ".join(["python -m benchmarks.attention8", *sys.argv[1:]])
        self.common = {"device": device, "jax": jax.__version__, "command": asked}
        print(self.common, flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, **entry) -> None:
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in entry.items()
        )
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps(self.common | entry) + "\n")


def measure(rows: Rows, case: FlashCase, variants, limit_s: float) -> None:
    ranges = [n for n in (case.slots, case.anchor, case.block) if n]
    k, v = (tuple(normal(seed + i, 1, n, KV_HEADS, DIM) for i, n in enumerate(ranges)) for seed in (1, 11))
    arrays = (normal(0, 1, case.anchor + case.block, HEADS, DIM), k, v, jnp.int32(case.passing))
    exact = exact_samples(case, arrays)
    for name, eight, config in variants:
        if rows.seconds > limit_s:
            rows.add(case=case.name, variant=name, reason="the time is up")
            continue

        def run(q, k, v, passed, eight=eight, config=config):
            return mosaic_gpu(make_call(q, k, v, case.rows(passed), None, eight), config)

        try:
            error_out, error_lse = flash_parity(case, run, arrays, exact)
            ms, again = device_ms(run, [arrays]), device_ms(run, [arrays])
            ahead = 0.0
            if eight is not None:
                ahead = device_ms(
                    lambda q, k, v, passed, e=eight: quantise_only(q, k, v, case.rows(passed), e), [arrays]
                )
        except Exception as error:  # noqa: BLE001 - one variant's failure must not cost the others: printed
            rows.add(case=case.name, variant=name, reason=f"{type(error).__name__}: {str(error)[:600]}")
            continue
        rate, alone = case.work.rate(ms), case.work.rate(ms - ahead)
        rows.add(
            case=case.name, variant=name, error_out=error_out, error_lse=error_lse, ms=ms, ms_again=again,
            quantise_ms=ahead, tflops=rate, tflops_without_quantising=alone, percent_of_peak=100 * alone / PEAK_8_BIT,
        )  # fmt: skip


def attended(q, k, v, seen, eight: EightBit | None, config: Config | None) -> jax.Array:
    """By Hopper's kernel; without a GPU by the emulation."""
    if jax.default_backend() == "gpu":
        return mosaic_gpu(make_call(q, (k,), (v,), seen, None, eight), config)[0]
    return flash_attention(q, (k,), (v,), seen, eight=eight)[0]


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal numbers drawn in float32: drawn in bfloat16 there are so few that their rounding errors do not average."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.bfloat16)


def error_by_length(rows: Rows, limit_s: float) -> dict[str, dict[int, float]]:
    """128 rows over 1K to 128K keys: relative errors of bf16 and of each recipe, by variant and keys."""
    own = VARIANTS[:4] if jax.default_backend() == "gpu" else VARIANTS[:3]  # an emulation has nothing to promote
    variants = [(name.removesuffix(", this kernel"), *rest) for name, *rest in own]
    errors: dict[str, dict[int, float]] = {name: {} for name, *_ in variants}
    for keys in LENGTHS:
        if rows.seconds > limit_s:
            break
        q = normal(0, 1, 128, HEADS, DIM)
        k, v = (normal(seed, 1, keys, KV_HEADS, DIM) for seed in (1, 2))
        seen, failed = (RowSegment(128, 0, keys, keys),), {}
        wide = [array.astype(jnp.float32) for array in (q, k, v)]
        want = jax.jit(functools.partial(exact_attention, seen=seen))(*wide)
        for name, eight, config in variants:
            run = functools.partial(attended, seen=seen, eight=eight, config=config)
            try:
                got = jax.jit(run)(q, k, v).astype(jnp.float32)
                errors[name][keys] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
            except Exception as error:  # noqa: BLE001 - as above
                failed[name] = f"{type(error).__name__}"
        rows.add(
            case="error by length", keys=keys, **{name: of[keys] for name, of in errors.items() if keys in of}, **failed
        )
    return errors


def exact_attention(q, k, v, seen) -> jax.Array:
    return flash_attention(q, (k,), (v,), seen, implementation="xla_chunked")[0]


def draw(errors: dict[str, dict[int, float]], path: Path) -> None:
    """Relative error in percent over the number of keys, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for name, found in errors.items():
        axis.plot(list(found), [100 * error for error in found.values()], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_yticks(PERCENT, [f"{n:g}" for n in PERCENT], minor=False)
    axis.set_yticks([], minor=True)
    axis.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
    where = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else "emulated on a CPU"
    axis.set(xlabel="keys", ylabel="relative error of the result, %", title=f"Attention against float32, {where}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


@command("python -m benchmarks.attention8")
def main(argv: list[str]) -> None:
    """Measure; see the module's docstring."""
    parser = Parser(prog="python -m benchmarks.attention8", description=__doc__)
    parser.add_argument(
        "--limit-s", type=float, default=90.0, help="start no variant after so many seconds (default: 90)"
    )
    parser.add_argument("--out", type=Path, help="file for JSON lines")
    parser.add_argument(
        "--variants", type=lambda text: [int(i) for i in text.split(",")], help="numbers of variants, from 0"
    )
    parser.add_argument("--section", type=names, default=SECTIONS, help=f"default: {','.join(SECTIONS)}")
    parser.add_argument("--plot", type=Path, help="picture of section lengths")
    args = parser.parse_args(argv)
    if wrong := [name for name in args.section if name not in SECTIONS]:
        parser.error(f"--section: {wrong[0]!r} is none of {', '.join(SECTIONS)}")
    rows = Rows(args.out)
    variants = VARIANTS if args.variants is None else [VARIANTS[i] for i in args.variants]
    for case in (FLASH_CASES[0], FLASH_CASES[4]) if "kernel" in args.section else ():
        measure(rows, case, variants, args.limit_s)
    if "lengths" in args.section:
        errors = error_by_length(rows, args.limit_s)
        if args.plot:
            draw(errors, args.plot)


if __name__ == "__main__":
    sys.exit(main())

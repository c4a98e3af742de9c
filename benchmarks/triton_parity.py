"""The kernels in the Triton language on one GPU: `python -m benchmarks.triton_parity [--old DIR]`.

For each case: errors against float32, median device time of 24 calls (twice), useful rate, the
percentage of a ceiling measured in the same run, and the seconds from the call to the compiled program. Beside it XLA
and, with ``--old DIR``, the Triton kernels of the pallas_kernels package in that folder, in a process of its own.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both processes need memory

import jax
import jax.numpy as jnp
import numpy as np

from apb_jax.command import Parser, command

HEADS, KV_HEADS, DIM = 32, 8, 128


@dataclass(frozen=True)
class Bench:
    """``run(name, *arrays)`` is the op; ``errors(outputs)`` compares with float32; ``work`` in TFLOP or GB a call."""

    op: str
    case: str
    run: Callable
    arrays: tuple
    errors: Callable
    work: float
    unit: str
    names: tuple[str, ...]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def relative(got, want) -> float:
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    if (np.isinf(got) != np.isinf(want)).any() or np.isnan(got).any():
        return float("nan")
    finite = np.isfinite(want)
    return float(np.linalg.norm(got[finite] - want[finite]) / np.linalg.norm(want[finite]))


def flash_bench(case: str, anchor: int, passed: int, slots: int, block: int) -> Bench:
    """The APB prefill of one shard, or with only a block plain causal attention; samples of 64 rows against float32."""
    from pallas_kernels.flash_attention import RowSegment, flash_attention

    ranges = [length for length in (slots, anchor, block) if length]
    q = normal(0, 1, anchor + block, HEADS, DIM)
    k, v = (tuple(normal(seed + i, 1, length, KV_HEADS, DIM) for i, length in enumerate(ranges)) for seed in (1, 11))
    first = slots + anchor

    def rows(passed):
        own = RowSegment(block, slots - passed, first, first + block)
        return (RowSegment(anchor, slots, slots, first), own) if anchor else (own,)

    def run(name, q, k, v, passed):
        return flash_attention(q, k, v, rows(passed), implementation=name)

    @jax.jit
    def exact(q, k, v, row, start, offset, end):
        q = jax.lax.dynamic_slice_in_dim(q, row, 64, 1)
        q, k, v = jax.tree.map(lambda a: a.astype(jnp.float32), (q, k, v))
        return flash_attention(q, k, v, (RowSegment(64, start, offset, end),), implementation="xla_chunked")

    def errors(outputs):
        found, before = [], 0
        for segment in rows(jnp.int32(passed)):
            for skipped in (0, segment.rows // 2, segment.rows - 64):
                row = before + skipped
                bounds = (jnp.int32(b) for b in (segment.start, segment.offset + skipped, segment.end))
                want = exact(q, k, v, jnp.int32(row), *bounds)
                parts = outputs[0][:, row : row + 64], outputs[1][:, :, row : row + 64]
                found.append([relative(a.astype(jnp.float32), b) for a, b in zip(parts, want, strict=True)])
            before += segment.rows
        return {"error_out": max(f[0] for f in found), "error_lse": max(f[1] for f in found)}

    pairs = anchor**2 / 2 + block * (anchor + passed) + block**2 / 2
    arrays = (q, k, v, jnp.int32(passed))
    work = 4e-12 * HEADS * DIM * pairs
    return Bench("flash_attention", case, run, arrays, errors, work, "TFLOP/s", ("triton", "cudnn"))


def sparse_bench(case: str, block: int, windows: int, columns: int) -> Bench:
    from benchmarks.kernels import sparse_tiles
    from pallas_kernels.block_sparse_attention import Blocks, block_sparse_attention

    rows = 32768
    q, k, v = (normal(s, 1, rows, heads, DIM) for s, heads in ((0, HEADS), (1, KV_HEADS), (2, KV_HEADS)))
    tiles, pairs = sparse_tiles(rows, block, windows, columns)
    shape = {"blocks": Blocks(block, block)}

    def run(name, q, k, v, tiles):
        return block_sparse_attention(q, k, v, tiles, **shape, implementation=name)

    def errors(outputs):
        sample = slice(rows - 4 * block, rows)  # the reference's mask is dense
        want = block_sparse_attention(
            *(a.astype(jnp.float32) for a in (q[:, sample], k, v)), jax.tree.map(lambda a: a[:, :, -4:], tiles),
            **shape, causal_offset=rows - 4 * block, implementation="reference",
        )  # fmt: skip
        parts = outputs[0][:, sample].astype(jnp.float32), outputs[1][:, :, sample]
        return dict(zip(("error_out", "error_lse"), map(relative, parts, want), strict=True))

    work = 4e-12 * HEADS * DIM * pairs
    return Bench("block_sparse", case, run, (q, k, v, tiles), errors, work, "TFLOP/s", ("triton", "xla"))


BENCHES = {
    "flash_attention": [
        lambda: flash_bench("causal 16K", 0, 0, 0, 16384),
        lambda: flash_bench("APB shard 7 of 8", 4096, 7 * 2048, 7 * 2048, 16384),
    ],
    "block_sparse": [
        lambda: sparse_bench("a quarter of 128 x 128", 128, 63, 0),
        lambda: sparse_bench("64 of 64, 512 columns", 64, 64, 512),
    ],
}


def measure(bench: Bench, name: str, label: str) -> dict:
    """One row; a refusal or a failure to compile or run is a row that says so."""
    from pallas_kernels import Unsupported
    from pallas_kernels.timing import device_ms

    row: dict = {"op": bench.op, "case": bench.case, "label": label}

    def call(*arrays):
        return bench.run(name, *arrays)

    begin = time.perf_counter()
    try:
        compiled = jax.jit(call).lower(*bench.arrays).compile()
        row["compile_s"] = time.perf_counter() - begin
        row |= bench.errors(compiled(*bench.arrays))
        repeats = 4 if (bench.op, name) == ("block_sparse", "xla") else 24
        row["ms"] = [device_ms(call, [bench.arrays], repeats=repeats) for _ in range(2)]
        row |= {"rate": bench.work / (min(row["ms"]) * 1e-3), "unit": bench.unit}
    except Unsupported as refusal:
        row["failure"] = str(refusal)
    except Exception as failure:  # noqa: BLE001 - one kernel that fails must not hide the others' figures
        row["failure"] = f"{type(failure).__name__}: {str(failure)[:600]}"
    return row


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large bfloat16 product, GB/s of a copy (read plus written)."""
    from pallas_kernels.timing import device_ms

    a, b, x = normal(0, 20480, 4096), normal(1, 4096, 28672), jnp.ones((2**29,), jnp.float32)
    product = device_ms(lambda a, b: a @ b, [(a, b)])
    return {
        "TFLOP/s": 2e-9 * 20480 * 4096 * 28672 / product,
        "GB/s": 2e-6 * x.nbytes / device_ms(lambda x: x * 2.0, [(x,)]),
    }


def text(row: dict, ceiling: dict[str, float]) -> str:
    head = f"{row['op']:16} {row['case']:24} {row['label']:14}"
    if "failure" in row:
        return f"{head} not measured: {row['failure']}"
    times = ", ".join(f"{ms:.4f}" for ms in row["ms"])
    share = 100 * row["rate"] / ceiling[row["unit"]]
    errors = " ".join(f"{key}={value:.2g}" for key, value in row.items() if key.startswith(("error", "differing")))
    speed = f"{times:>18} ms {row['rate']:8.1f} {row['unit']:7} {share:5.1f}%"
    return f"{head} {speed} compile {row['compile_s']:4.1f} s {errors}"


def rows_of(ops: list[str], old: bool) -> list[dict]:
    rows = []
    for op in ops:
        for make in BENCHES[op]:
            bench = make()
            for name in ("triton",) if old else bench.names:
                rows.append(measure(bench, name, "triton, old" if old else name))
    return rows


@command("python benchmarks/triton_parity.py")
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--old", type=Path, help="folder that holds another pallas_kernels to measure beside this one")
    parser.add_argument("--only", choices=BENCHES, action="append", help="this op only (repeatable)")
    parser.add_argument("--out", type=Path, help="file for one JSON line a row")
    parser.add_argument("--rows-of", type=Path, help=argparse.SUPPRESS)  # what the process for --old is asked
    options = parser.parse_args(argv)
    ops = options.only or list(BENCHES)
    if jax.default_backend() != "gpu":
        print("error: JAX sees no GPU; these measurements need one", file=sys.stderr)
        return 2
    if options.rows_of:
        package = Path(importlib.import_module("pallas_kernels").__file__ or "").resolve()
        if not package.is_relative_to(options.rows_of.resolve()):
            print(f"error: {options.rows_of} holds no pallas_kernels; {package} was found", file=sys.stderr)
            return 2
        print(json.dumps(rows_of(ops, old=True)))
        return 0
    versions = {name: importlib.import_module(name).__version__ for name in ("jax", "triton", "jax_triton")}
    device = jax.devices()[0].device_kind
    ceiling = ceilings()
    print(device, versions, {unit: round(rate) for unit, rate in ceiling.items()}, flush=True)
    rows = rows_of(ops, old=False)
    if options.old:
        flags = [flag for op in ops for flag in ("--only", op)]
        # As a script, so that the folders of PYTHONPATH come before the working directory.
        child = [sys.executable, __file__, "--rows-of", str(options.old), *flags]
        folders = f"{options.old.resolve()}{os.pathsep}{Path(__file__).resolve().parents[1]}"
        environment = {**os.environ, "PYTHONPATH": folders}
        done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
    for row in sorted(rows, key=lambda row: (row["op"], row["case"])):
        print(text(row, ceiling), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({"device": device, **versions, "ceilings": ceiling, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

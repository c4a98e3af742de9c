"""Measures the GPU kernels: `python -m benchmarks.kernels [--only flash_attention] [--quick]`.

For each case: parity against float32 in the same process, then the median device time of at least 20 calls
(CUPTI, sum over the kernels of one call; inputs are rotated where one set fits into the L2 cache), useful
TFLOP/s or GB/s, and the percentage of a ceiling measured in the same run (a large bfloat16 matrix product, a
device copy). Every implementation that accepts the case runs beside the others, and so do the PyTorch peers
(`benchmarks/peers_torch.py`, a process of its own on the same machine). One JSON line a row goes to
benchmarks/results/<device>_<date>.jsonl.
"""

import dataclasses
import datetime
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the PyTorch peers need memory too

import jax
import jax.numpy as jnp
import numpy as np

from apb_jax.command import Parser, command
from pallas_kernels import Unsupported, device
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention
from pallas_kernels.block_sparse_attention.api import IMPLEMENTATIONS as SPARSE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.api import IMPLEMENTATIONS as DECODE
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH
from pallas_kernels.retaining_score import RowLimits, retaining_score
from pallas_kernels.retaining_score.api import IMPLEMENTATIONS as SCORE
from pallas_kernels.select import select_topk
from pallas_kernels.select.api import IMPLEMENTATIONS as SELECT
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.skinny_matmul.api import IMPLEMENTATIONS as SKINNY
from pallas_kernels.timing import device_ms, rested_ms

HEADS, KV_HEADS, DIM = 32, 8, 128
L2_BYTES = 60e6
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do: floating-point operations, or bytes where memory is the limit."""

    amount: float
    unit: str  # "TFLOP/s" or "GB/s"

    def rate(self, ms: float) -> float:
        return self.amount / ms * 1e3 / (1e12 if self.unit == "TFLOP/s" else 1e9)


def relative_error(got, want) -> float:
    got, want = (jnp.asarray(a, jnp.float32) for a in (got, want))
    finite = jnp.isfinite(want)
    difference = jnp.where(finite, got - want, jnp.where(got == want, 0.0, jnp.nan))
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(jnp.where(finite, want, 0.0).ravel()))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


class Report:
    """Prints rows and appends them as JSON lines."""

    def __init__(self, path: Path, flags: list[str]):
        self.path = path
        self.ceilings: dict[str, float] = {}
        self.common = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.kernels", *flags]),
        }

    def row(self, op: str, case: str, implementation: str, ms: float, work: Work, **more) -> None:
        rate = work.rate(ms)
        share = 100 * rate / self.ceilings[work.unit] if work.unit in self.ceilings else None
        extra = " ".join(f"{name}={value:.3g}" for name, value in more.items() if isinstance(value, float))
        of_ceiling = "" if share is None else f"{share:5.1f}% of ceiling"
        print(f"{op:18} {case:24} {implementation:22} {ms:9.4f} ms {rate:8.1f} {work.unit} {of_ceiling} {extra}")
        sys.stdout.flush()
        self._write(
            op=op, case=case, implementation=implementation, ms=ms, rate=rate, unit=work.unit,
            percent_of_ceiling=share, **more,
        )  # fmt: skip

    def note(self, op: str, case: str, implementation: str, reason: str) -> None:
        print(f"{op:18} {case:24} {implementation:22} not measured: {reason}")
        sys.stdout.flush()
        self._write(op=op, case=case, implementation=implementation, reason=reason)

    def _write(self, **entry) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**self.common, **entry}) + "\n")


def measure_ceilings(report: Report) -> None:
    """A large matrix product (TFLOP/s) and a device copy (GB/s, bytes read plus written)."""
    rows, inner, columns = 20480, 4096, 28672
    a, b = normal(0, rows, inner), normal(1, inner, columns)
    ms = device_ms(lambda a, b: a @ b, [(a, b)])
    work = Work(2.0 * rows * inner * columns, "TFLOP/s")
    report.ceilings["TFLOP/s"] = work.rate(ms)
    report.row("ceiling", f"matmul {rows}x{inner}x{columns}", "cuBLAS", ms, work)
    x = jnp.ones((2**29,), jnp.float32)
    ms = device_ms(lambda x: x * 2.0, [(x,)])
    work = Work(2.0 * x.nbytes, "GB/s")
    report.ceilings["GB/s"] = work.rate(ms)
    report.row("ceiling", "copy of 2 GiB", "XLA", ms, work)


@dataclasses.dataclass(frozen=True)
class FlashCase:
    """An attention case of the APB prefill or plain causal attention."""

    name: str
    anchor: int
    passing: int  # tokens passed to this shard
    slots: int  # passing slots that exist
    block: int

    @property
    def work(self) -> Work:
        pairs = self.anchor**2 / 2 + self.block * (self.anchor + self.passing) + self.block**2 / 2
        return Work(4.0 * HEADS * DIM * pairs, "TFLOP/s")

    def arrays(self) -> tuple:
        ranges = [n for n in (self.slots, self.anchor, self.block) if n]
        q = normal(0, 1, self.anchor + self.block, HEADS, DIM)
        k, v = (tuple(normal(seed + i, 1, n, KV_HEADS, DIM) for i, n in enumerate(ranges)) for seed in (1, 11))
        return q, k, v, jnp.int32(self.passing)

    def rows(self, passed) -> tuple[RowSegment, ...]:
        """The bounds that change from shard to shard come from the device, as in the engine."""
        first = self.slots + self.anchor
        if not first:
            return (RowSegment(self.block, 0, 0, self.block),)
        # Shard 0 has a dead anchor, which its measured case leaves out.
        return (
            *((RowSegment(self.anchor, self.slots, self.slots, first),) if self.anchor else ()),
            RowSegment(self.block, self.slots - passed, first, first + self.block),
        )


FLASH_CASES = (
    FlashCase("APB shard 7 of 8", 4096, 7 * 2048, 7 * 2048, 16384),
    FlashCase("APB shard 3 of 8", 4096, 3 * 2048, 7 * 2048, 16384),
    FlashCase("APB shard 0 of 8", 4096, 0, 7 * 2048, 16384),
    FlashCase("causal 16K", 0, 0, 0, 16384),
    FlashCase("causal 32K", 0, 0, 0, 32768),
    FlashCase("causal 128K", 0, 0, 0, 131072),
)


SAMPLE = 64


def sampled_rows(case: FlashCase) -> list[int]:
    """First rows of the samples that are compared: start, middle and end of each segment."""
    starts = []
    for first, rows in ((0, case.anchor), (case.anchor, case.block)):
        starts += [first, first + rows // 2, first + rows - SAMPLE] if rows else []
    return starts


def exact_samples(case: FlashCase, arrays: tuple) -> list[tuple]:
    """float32 out and lse of the sampled rows."""
    q, k, v, passed = arrays

    @jax.jit
    def attend(q, k, v, start, offset, end):
        rows = (RowSegment(SAMPLE, start, offset, end),)
        q, k, v = jax.tree.map(lambda a: a.astype(jnp.float32), (q, k, v))
        return flash_attention(q, k, v, rows, implementation="xla_chunked")

    results = []
    for row in sampled_rows(case):
        segments = case.rows(passed)
        segment = segments[0] if row < segments[0].rows else segments[-1]
        skipped = row if segment is segments[0] else row - case.anchor
        bounds = (jnp.int32(b) for b in (segment.start, segment.offset + skipped, segment.end))
        results.append(attend(q[:, row : row + SAMPLE], k, v, *bounds))
    return results


def flash_parity(case: FlashCase, run: Callable, arrays: tuple, exact: list[tuple]) -> tuple[float, float]:
    """Errors of out and lse against float32 on the sampled rows."""
    out, lse = jax.jit(run)(*arrays)
    rows = sampled_rows(case)
    outs = [relative_error(out[:, r : r + SAMPLE], want[0]) for r, want in zip(rows, exact, strict=True)]
    lses = [relative_error(lse[:, :, r : r + SAMPLE], want[1]) for r, want in zip(rows, exact, strict=True)]
    return max(outs), max(lses)


def bench_flash(report: Report, quick: bool) -> None:
    for case in FLASH_CASES[: 5 if quick else None]:
        arrays = case.arrays()
        exact = exact_samples(case, arrays)
        for implementation in FLASH:
            if not implementation.automatic or implementation.name == "xla_chunked":
                continue

            def run(q, k, v, passed, name=implementation.name, case=case):
                return flash_attention(q, k, v, case.rows(passed), implementation=name)

            try:
                errors = flash_parity(case, run, arrays, exact)
            except Unsupported as refusal:
                report.note("flash_attention", case.name, implementation.name, str(refusal))
                continue
            report.row(
                "flash_attention", case.name, implementation.name, device_ms(run, [arrays]), case.work,
                ms_again=device_ms(run, [arrays]), ms_rested=rested_ms(run, arrays), error_out=errors[0],
                error_lse=errors[1],
            )  # fmt: skip


def bench_decode(report: Report, quick: bool) -> None:
    for keys, rows in ((16384, 1), (131072, 1), (16384, 16), (131072, 64))[: 2 if quick else None]:
        case = f"{rows} row{'s' * (rows > 1)}, cache {keys // 1024}K"
        size = 2 * keys * KV_HEADS * DIM * 2
        count = max(1, int(3 * L2_BYTES // size) + 1)
        sets = [
            (normal(3 * i, 1, rows, HEADS, DIM), *(normal(3 * i + j, 1, keys, KV_HEADS, DIM) for j in (1, 2)))
            for i in range(count)
        ]
        want = decode_attention(*(a.astype(jnp.float32) for a in sets[0]), keys, implementation="xla")
        for implementation in DECODE:
            if implementation.name == "reference":
                continue

            def run(q, k, v, name=implementation.name, keys=keys):
                length = jax.lax.optimization_barrier(jnp.full((1,), keys, jnp.int32))
                return decode_attention(q, k, v, length, implementation=name)

            try:
                out, lse = jax.jit(run)(*sets[0])
            except Unsupported as refusal:
                report.note("decode_attention", case, implementation.name, str(refusal))
                continue
            report.row(
                "decode_attention", case, implementation.name, device_ms(run, sets), Work(float(size), "GB/s"),
                ms_again=device_ms(run, sets), error_out=relative_error(out, want[0]),
                error_lse=relative_error(lse, want[1]),
            )  # fmt: skip


def bench_score(report: Report, quick: bool) -> None:
    del quick
    rows, width, hidden = 20480, (HEADS + 2 * KV_HEADS) * DIM, 1024
    x, w1, w2 = normal(0, 1, rows, width), normal(1, width, hidden) / 64, normal(2, hidden, KV_HEADS) / 16
    first = Work(2.0 * rows * width * hidden, "TFLOP/s")
    ms = device_ms(lambda x, w1: x[0] @ w1, [(x, w1)])
    report.row("retaining_score", "first product alone", "cuBLAS", ms, first)
    marks = {"limits": RowLimits(0, 4096, rows)}
    want = jax.jit(functools.partial(retaining_score, implementation="reference", **marks))(x, w1, w2)
    folded = x[0].astype(jnp.bfloat16) @ w1
    want_folded = retaining_score(None, None, w2, hidden=folded[None], implementation="reference", **marks)
    for implementation in SCORE:
        if implementation.name == "reference":
            continue

        def run(x, w1, w2, name=implementation.name):
            return retaining_score(x, w1, w2, implementation=name, **marks)

        def run_folded(hidden, w2, name=implementation.name):
            return retaining_score(None, None, w2, hidden=hidden, implementation=name, **marks)

        for case, call, arrays, exact, work in (
            ("20480 rows", run, (x, w1, w2), want, first),
            ("20480 rows, folded", run_folded, (folded[None], w2), want_folded, Work(2.0 * folded.size, "GB/s")),
        ):
            try:
                got = jax.jit(call)(*arrays)
            except Unsupported as refusal:
                report.note("retaining_score", case, implementation.name, str(refusal))
                continue
            error = relative_error(got[:, 4096:], exact[:, 4096:])
            report.row(
                "retaining_score", case, implementation.name, device_ms(call, [arrays]), work,
                ms_again=device_ms(call, [arrays]), error=error,
            )  # fmt: skip


def bench_select(report: Report, quick: bool) -> None:
    for rows, count in ((16384, 2048), (20480, 2048), (16384, 512))[: 1 if quick else None]:
        scores = jax.random.normal(jax.random.key(0), (1, rows, KV_HEADS), jnp.float32)
        k, v = normal(1, 1, rows, KV_HEADS, DIM), normal(2, 1, rows, KV_HEADS, DIM)
        want = select_topk(scores, k, v, count, implementation="reference")
        case = f"{KV_HEADS} x {rows} -> {count}"
        work = Work(4.0 * count * KV_HEADS * DIM * 2, "GB/s")
        for implementation in SELECT:
            if implementation.name == "reference":
                continue

            def run(scores, k, v, name=implementation.name, count=count):
                return select_topk(scores, k, v, count, implementation=name)

            try:
                got = jax.jit(run)(scores, k, v)
            except Unsupported as refusal:
                report.note("select_topk", case, implementation.name, str(refusal))
                continue
            same = all(bool((a == b).all()) for a, b in zip(got, want, strict=True))
            if not same:
                raise SystemExit(f"error: select_topk {implementation.name} differs from the reference on {case}")
            ms = device_ms(run, [(scores, k, v)])
            report.row("select_topk", case, implementation.name, ms, work, ms_again=device_ms(run, [(scores, k, v)]))


def bench_skinny(report: Report, quick: bool) -> None:
    """The products of one decoding step of a Llama-3.1-8B layer; as many layers as keep the L2 cache cold."""
    cases = (
        ("gate and up", 4096, (14336, 14336), 1),
        ("down", 14336, (4096,), 1),
        ("q, k and v", 4096, (4096, 1024, 1024), 1),
        ("o", 4096, (4096,), 1),
        ("gate and up", 4096, (14336, 14336), 4),
    )
    for name, depth, widths, rows in cases[: 1 if quick else None]:
        size = 2 * depth * sum(widths)
        layers = max(2, int(3 * L2_BYTES // size) + 1)
        x = normal(0, rows, depth)
        stacks = tuple(normal(1 + n, layers, depth, width) / 64 for n, width in enumerate(widths))
        sets = [(x, jnp.int32(layer), *stacks) for layer in range(layers)]
        want = skinny_matmul(x, stacks, 1, implementation="reference")
        case = f"{name}, {rows} row{'s' * (rows > 1)}"
        for implementation in SKINNY:
            if implementation.name == "reference":
                continue

            def run(x, layer, *stacks, name=implementation.name):
                return skinny_matmul(x, stacks, layer, implementation=name)

            try:
                got = jax.jit(run)(*sets[1])
            except Unsupported as refusal:
                report.note("skinny_matmul", case, implementation.name, str(refusal))
                continue
            errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
            report.row(
                "skinny_matmul", case, implementation.name, device_ms(run, sets), Work(float(size), "GB/s"),
                ms_again=device_ms(run, sets), error=max(errors),
            )  # fmt: skip


def sparse_tiles(rows: int, block: int, windows: int, columns: int) -> tuple[KeyTiles, float]:
    """Each query tile's own window, ``windows`` earlier ones and ``columns`` other keys; and the pairs of a head."""
    rng = np.random.default_rng(0)
    tiles = rows // block
    starts, counts = np.zeros((HEADS, tiles, windows + 1), np.int32), np.zeros((HEADS, tiles), np.int32)
    lines, used = np.zeros((HEADS, tiles, max(columns, 1)), np.int32), np.zeros((HEADS, tiles), np.int32)
    for head, tile in np.ndindex(HEADS, tiles):
        earlier = min(tile, windows)
        chosen = np.sort(rng.choice(tile, earlier, replace=False))
        starts[head, tile, : earlier + 1] = np.append(chosen, tile) * block
        free = np.setdiff1d(np.arange(tile), chosen)[: -(-columns // block)]  # where no chosen window lies
        keys = (free[:, None] * block + np.arange(block)).ravel()[:columns]
        lines[head, tile, : len(keys)], used[head, tile] = keys, len(keys)
        counts[head, tile] = earlier + 1
    pairs = (counts - 1).sum() * block**2 + counts.size * block**2 / 2 + used.sum() * block
    lead = (jnp.asarray(starts)[None], jnp.asarray(counts)[None])
    return KeyTiles(*lead, *((jnp.asarray(lines)[None], jnp.asarray(used)[None]) if columns else ())), pairs / HEADS


def bench_sparse(report: Report, quick: bool) -> None:
    rows = 32768
    q, k, v = (normal(s, 1, rows, heads, DIM) for s, heads in ((0, HEADS), (1, KV_HEADS), (2, KV_HEADS)))
    cases = (("a quarter of 128 x 128", 128, 63, 0), ("64 windows of 64, 512 columns", 64, 64, 512))
    for case, block, windows, columns in cases[: 1 if quick else None]:
        tiles, pairs = sparse_tiles(rows, block, windows, columns)
        work = Work(4.0 * HEADS * DIM * pairs, "TFLOP/s")
        sample = slice(rows - 4 * block, rows)  # float32 of the last rows only: the reference's mask is dense
        few = jax.tree.map(lambda a: a[:, :, -4:], tiles)
        shape = {"blocks": Blocks(block, block)}
        want = block_sparse_attention(
            *(a.astype(jnp.float32) for a in (q[:, sample], k, v)), few, **shape,
            causal_offset=rows - 4 * block, implementation="reference",
        )  # fmt: skip
        for implementation in SPARSE:
            if implementation.name == "reference":
                continue

            def run(q, k, v, tiles, name=implementation.name, shape=shape):
                return block_sparse_attention(q, k, v, tiles, **shape, implementation=name)

            try:
                out, lse = jax.jit(run)(q, k, v, tiles)
            except Unsupported as refusal:
                report.note("block_sparse_attention", case, implementation.name, str(refusal))
                continue
            errors = relative_error(out[:, sample], want[0]), relative_error(lse[:, :, sample], want[1])
            ms = device_ms(run, [(q, k, v, tiles)], repeats=8)
            report.row(
                "block_sparse_attention", case, implementation.name, ms, work, error_out=errors[0], error_lse=errors[1]
            )


BENCHES = {
    "flash_attention": bench_flash,
    "decode_attention": bench_decode,
    "retaining_score": bench_score,
    "select_topk": bench_select,
    "skinny_matmul": bench_skinny,
    "block_sparse_attention": bench_sparse,
}


@command("python benchmarks/kernels.py")
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", choices=BENCHES, action="append", help="measure this op only (repeatable)")
    parser.add_argument("--quick", action="store_true", help="the main cases only")
    parser.add_argument("--peers", action="store_true", help="also run the PyTorch peers")
    parser.add_argument("--out", type=Path, help="file for the JSON lines")
    options = parser.parse_args(argv)
    here = device.current()
    if here.platform != "gpu":
        print(f"error: the default device is {here.name}; these measurements need a GPU", file=sys.stderr)
        return 2
    path = options.out or RESULTS / f"{here.slug}_{datetime.date.today().isoformat()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--only {name}" for name in options.only or ()]
    flags += [f"--{name}" for name in ("quick", "peers") if getattr(options, name)]
    report = Report(path, flags)
    measure_ceilings(report)
    for name in options.only or BENCHES:
        BENCHES[name](report, options.quick)
    if options.peers:
        command = [sys.executable, str(Path(__file__).parent / "peers_torch.py"), "--out", str(path)]
        return subprocess.run(command, check=False).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

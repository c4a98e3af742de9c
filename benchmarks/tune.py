"""`python -m benchmarks.tune`: measures kernel parameters on this GPU and writes tuned/<device>.json."""

import argparse
import datetime
import itertools
import json
import sys

import jax
import jax.numpy as jnp

from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import check_output_file, write_json
from pallas_kernels import device, tuned
from pallas_kernels.decode_attention import mosaic_gpu as decode
from pallas_kernels.decode_attention.call import make_call as decode_call
from pallas_kernels.flash_attention import RowSegment
from pallas_kernels.flash_attention import mosaic_gpu as flash
from pallas_kernels.flash_attention.call import make_call as flash_call
from pallas_kernels.timing import device_ms

HEADS, KV_HEADS = 32, 8


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _fastest(op: str, dim: int, configs, measure) -> dict[str, int]:
    """The fields of the fastest configuration; one that does not fit the chip's shared memory is skipped."""
    best = None
    for fields in configs:
        try:
            ms = measure(fields)
        except ValueError as reason:
            if "shared memory" not in str(reason):
                raise
            print(f"{op} D {dim} {fields}: does not fit into shared memory", flush=True)
            continue
        print(f"{op} D {dim} {fields}: {ms:.4f} ms", flush=True)
        if best is None or ms < best[0]:
            best = ms, fields
    if best is None:
        raise UserError(f"no configuration of {op} fits D {dim} on this GPU")
    return best[1]


def _grid(**choices) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def tune_flash(dim: int) -> dict[str, int]:
    """The APB prefill of the last of 8 shards at 128K: the case that decides the prefill time."""
    slots, anchor, block = 7 * 2048, 4096, 16384
    q = _normal(0, 1, anchor + block, HEADS, dim)
    k, v = (tuple(_normal(s + n, 1, n, KV_HEADS, dim) for n in (slots, anchor, block)) for s in (1, 2))
    first = slots + anchor

    def measure(fields):
        def run(q, k, v, start):
            rows = RowSegment(anchor, slots, slots, first), RowSegment(block, start, first, first + block)
            return flash.forward(flash_call(q, k, v, rows, None), flash.Config(**fields))

        return device_ms(run, [(q, k, v, jnp.int32(0))])

    return _fastest("flash_attention", dim, _grid(stages=(2, 3)), measure)


def tune_decode(dim: int) -> dict[str, int]:
    """One row against 16K cached keys: latency matters most where the cache is short."""
    keys = 16384
    sets = [tuple(_normal(3 * i + j, 1, n, h, dim) for j, (n, h) in enumerate(((1, HEADS), *[(keys, KV_HEADS)] * 2)))
            for i in range(4)]  # fmt: skip

    def measure(fields):
        def run(q, k, v):
            return decode.split(decode_call(q, k, v, keys, None, None), decode.Config(**fields)).merged()

        return device_ms(run, sets)

    return _fastest("decode_attention", dim, _grid(block_keys=(64, 128), stages=(2, 3)), measure)


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m benchmarks.tune``."""
    parser = Parser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--head-dim", type=int, choices=(64, 128), action="append", help="default: both")
    return parser


@command("python -m benchmarks.tune")
def main(argv: list[str]) -> None:
    """Measure, and keep the fastest parameters beside those that were not measured."""
    options = make_parser().parse_args(argv)
    here = device.current()
    if reason := device.refuse_unless_hopper(here):
        raise UserError(f"tuning {reason}")
    dims = options.head_dim or [128, 64]
    path = check_output_file(tuned.path_for(here), "the table of this device")
    old = json.loads(path.read_text())["parameters"] if path.exists() else {}
    measured = {
        op: {**old.get(op, {}), **{str(dim): tune(dim) for dim in dims}}
        for op, tune in (("flash_attention", tune_flash), ("decode_attention", tune_decode))
    }
    entry = {
        "device": here.name,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "command": " ".join(["python -m benchmarks.tune", *argv]),
        "parameters": measured,
    }
    write_json(path, entry, indent=2)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

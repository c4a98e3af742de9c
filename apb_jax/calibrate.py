"""``python -m apb_jax.calibrate``: measure prefill on this machine once, for ``--method auto``.

    python -m apb_jax.calibrate --model tiny --lengths 1k,4k
    python -m apb_jax.calibrate --model llama3.1-8b --lengths 4k,16k,64k

Weights are random: times do not depend on them. The table goes to ~/.cache/apb_jax/calibration (or $XDG_CACHE_HOME).
"""

from __future__ import annotations

import sys

from apb_jax.arguments import count, lengths, shards
from apb_jax.command import Parser, command
from apb_jax.errors import UserError

QUERY_TOKENS = 32


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.calibrate", description=__doc__)
    parser.add_argument("--model", default="tiny", help="preset, HF folder or HF id (default: tiny)")
    parser.add_argument("--sp", type=shards, help="devices (default: all GPUs; without a GPU 8 simulated)")
    parser.add_argument("--lengths", type=lengths, default=(1024, 4096), help="document lengths (default: 1k,4k)")
    parser.add_argument("--repeat", type=count(1, 1000), default=3, help="timed runs a row; the median counts")
    return parser


@command("python -m apb_jax.calibrate")
def main(argv: list[str]) -> None:
    """Measure full on one device, and ring, Ulysses and APB on all of them, at every length."""
    args = make_parser().parse_args(argv)
    from apb_jax.mesh import DEFAULT_SIMULATED, has_accelerator, simulate_devices

    if not has_accelerator():
        simulate_devices(args.sp or DEFAULT_SIMULATED)
    import jax

    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.files import check_output_folder
    from apb_jax.measure.auto import calibration_path, write_calibration
    from apb_jax.weights.checkpoint import load

    use_compile_cache()
    model = load(args.model, weights="random")
    path = calibration_path(model.config, model.dtype.name)
    check_output_folder(path.parent, "the cache")
    longest = model.config.max_positions - QUERY_TOKENS
    if max(args.lengths) > longest:
        raise UserError(f"--lengths has {max(args.lengths)}; {args.model} has positions for at most {longest}")
    rows = measure(model, args.sp or len(jax.devices()), sorted(args.lengths), args.repeat)
    write_calibration(path, jax.devices()[0].device_kind, rows)
    print(f"{len(rows)} measurements written to {path}")


def measure(model: object, devices: int, lengths: list[int], repeat: int) -> list:
    """One ``Measurement`` per method and length."""
    import statistics

    import numpy as np

    from apb_jax.attention.registry import MethodSpec
    from apb_jax.engine import Engine
    from apb_jax.measure.auto import Measurement
    from apb_jax.mesh import make_mesh
    from apb_jax.weights.checkpoint import LoadedModel

    assert isinstance(model, LoadedModel)
    rng = np.random.default_rng(0)
    wanted = [("full", 1), *([(name, devices) for name in ("ring", "ulysses", "apb")] if devices > 1 else [("apb", 1)])]
    rows, engines = [], {}
    for method, used in wanted:
        if used not in engines:
            engines[used] = Engine(model, method, make_mesh(sp=used))
        engine = engines[used].with_method(method, shards=MethodSpec(method).shards_on(used))
        for tokens in lengths:
            ids = [rng.integers(0, model.config.vocab_size, n) for n in (tokens, QUERY_TOKENS)]
            prompt = engine.prompt(*ids)
            chosen, _ = engine.choose([prompt])
            if chosen.name != method:  # too short for it: what it falls back to is not what is asked about
                continue
            times = [engine.prefill([prompt]).prefill_s for _ in range(repeat + 1)][1:]
            rows.append(Measurement(method, used, tokens, statistics.median(times)))
            print(f"{method:<8} on {used:>2}  {tokens:>8} tokens  {rows[-1].prefill_s:9.4f} s", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())

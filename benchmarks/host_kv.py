"""Document KV in host memory beside KV on the devices: prefill, decoding, peak, and what of the host's link is used.

    python benchmarks/host_kv.py --out OUT                       # 128K beside the devices, then 384K, 768K, 1M
    python benchmarks/host_kv.py --model tiny --seqs 2k --both 2k

Each case is a process of its own: memory is its own peak. Random weights, random ids. Lengths of ``--both`` run in
both memories, and the logits of both are compared. ``floor_ms``: bytes of the document's KV over the bandwidth measured
in the same process; decoding cannot be faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from apb_jax.arguments import length, lengths, size
from apb_jax.command import Parser, command
from apb_jax.kv_memory import DEVICE, HOST, PLACES

ROW = "row: "
NEW_TOKENS = 9
REPEATS = 2


def one(args: argparse.Namespace) -> None:
    """One case in this process; prints a row and keeps its logits for the comparison."""
    from apb_jax.mesh import has_accelerator, reserve_host_memory, reserve_memory, simulate_devices

    if has_accelerator():
        reserve_memory()
        reserve_host_memory()
    else:
        simulate_devices(args.sp)
    import jax
    import numpy as np

    import apb_jax
    from apb_jax.measure.host_link import bandwidth, host_note
    from apb_jax.measure.memory import Case, memory_of
    from apb_jax.measure.plan import spread
    from apb_jax.report import versions
    from apb_jax.task import RANDOM_QUERY_TOKENS

    model = apb_jax.load(args.model, weights="random")
    spec, mesh = apb_jax.MethodSpec(args.method), apb_jax.make_mesh(args.sp)
    engine = apb_jax.Engine(model, spec, mesh, shards=spec.shards_on(args.sp), kv_memory=args.one)
    rng = np.random.default_rng(0)
    sizes = (args.seq - RANDOM_QUERY_TOKENS - NEW_TOKENS, RANDOM_QUERY_TOKENS)
    prompt = engine.prompt(*(rng.integers(0, model.config.vocab_size, n) for n in sizes))
    if args.stay:
        engine = spread(engine, [prompt], NEW_TOKENS, args.stay)
    planned = memory_of(Case.of(engine), *Case.of(engine).chosen([prompt]), RANDOM_QUERY_TOKENS, NEW_TOKENS)
    host_note(engine, [prompt])  # refuses what the host does not hold
    seconds, answer = [], None
    for _ in range(REPEATS):  # the first compiles
        session = engine.prefill([prompt])
        (answer,) = session.generate(NEW_TOKENS, stop_ids=(), logits=True)
        seconds.append(session.prefill_s)
        del session
    assert answer is not None
    np.save(args.logits, answer.step_logits)
    rate = bandwidth(mesh)
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    row = {
        "benchmark": "host_kv", "date": date.today().isoformat(), "device": jax.devices()[0].device_kind,
        "devices": mesh.size, "model": args.model, "method": args.method, "kv": args.one,
        "kv_layers_that_stay": engine.settings.kv_layers, "document_tokens": sizes[0],
        "prefill_s": seconds[-1], "query_s": answer.query_s, "decode_ms_per_token": answer.decode_ms_per_token,
        "peak_bytes": max(one.get("peak_bytes_in_use", 0) for one in stats),
        "planned_bytes": planned.bytes_per_device, "host_bytes": planned.host_bytes,
        "host_to_device_gb_per_s": rate / 1e9, "floor_ms": 1e3 * planned.host_bytes / rate, "versions": versions(),
    }  # fmt: skip
    print(ROW + json.dumps(row), flush=True)


@command("python benchmarks/host_kv.py")
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b-1m")
    parser.add_argument("--method", default="apb")
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument("--both", type=lengths, default=(131072,), help="lengths that run in both memories")
    parser.add_argument(
        "--seqs", type=lengths, default=(393216, 786432, 1048576), help="lengths that run in host memory alone"
    )
    parser.add_argument("--limit-s", type=float, default=400.0)
    parser.add_argument("--stay", type=size, help="layers stay on a device of so much memory (75g); without it none")
    parser.add_argument("--seq", type=length, help=argparse.SUPPRESS)
    parser.add_argument("--logits", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=PLACES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.one:
        one(args)
        return 0
    import numpy as np

    started, failed = time.perf_counter(), 0
    cases = [(seq, place) for seq in args.both for place in PLACES]
    cases += [(seq, HOST) for seq in args.seqs if seq not in args.both]
    with tempfile.TemporaryDirectory() as folder:
        for seq, place in cases:
            left = args.limit_s - (time.perf_counter() - started)
            if left < 10:
                print(f"{seq} {place}: not run, {args.limit_s:.0f} s are over", flush=True)
                continue
            file = Path(folder, f"{seq}-{place}.npy")
            given = ["--model", args.model, "--method", args.method, "--sp", str(args.sp), "--seq", str(seq)]
            given += ["--stay", str(args.stay)] if args.stay else []
            call = [sys.executable, __file__, *given, "--one", place, "--logits", str(file)]
            try:
                done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=left)
            except subprocess.TimeoutExpired:
                print(f"{seq} {place}: stopped, {args.limit_s:.0f} s are over", flush=True)
                continue
            found = next((text for text in done.stdout.splitlines() if text.startswith(ROW)), None)
            if found is None:
                failed += 1
                print(f"{seq} {place}: died with status {done.returncode}: {done.stderr[-800:]}", flush=True)
                continue
            row = json.loads(found.removeprefix(ROW))
            other = Path(folder, f"{seq}-{DEVICE}.npy")
            if place == HOST and other.exists():
                ours, theirs = np.load(file), np.load(other)
                row["logits_off_by"] = float(np.abs(ours - theirs).max())
                row["logits_spread"] = float(theirs.std())
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                with (args.out / "host_kv.jsonl").open("a") as out:
                    out.write(json.dumps(row) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fresh random needles: how many the packaged model finds, exactly.

    python benchmarks/needles.py --count 40 --seq 8k,16k --methods full,apb [further flags of apb_jax.run]

Every needle is what ``apb_jax.run --needle DIGITS --depth D --seed S`` builds (7 to 12 digits at a random depth);
the engine is kept between them and answers in batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from apb_jax.command import Parser, command
from apb_jax.options import parse
from apb_jax.report import first_number, versions
from apb_jax.run import choose_devices
from apb_jax.synthetic.grading import wilson
from apb_jax.task import make_task


@command("python benchmarks/needles.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", default="8k,16k")
    parser.add_argument("--methods", default="full,apb")
    parser.add_argument("--seed", type=int, default=9_000_000, help="training used other seeds")
    parser.add_argument("--out", type=Path)
    args, further = parser.parse_known_args()
    choose_devices(parse(further), Console(stderr=True))

    import jax

    import apb_jax

    base = parse(further)
    mesh = apb_jax.make_mesh(base.sp)
    engine = apb_jax.Engine(apb_jax.load("tiny"), "full", mesh, shards=base.shards)
    for seq in args.seq.split(","):
        rng = np.random.default_rng(args.seed)
        tasks, commands = [], []
        for i in range(args.count):
            digits = "".join(map(str, rng.integers(0, 10, rng.integers(7, 13))))
            flags = ["--needle", digits, "--depth", f"{rng.random():.3f}", "--seed", str(args.seed + i), "--seq", seq]
            tasks.append(make_task(parse([*further, *flags]), None, engine))
            commands.append(" ".join(flags))
        for method in args.methods.split(","):
            current = engine.with_method(method)
            answers = []
            for start in range(0, args.count, args.batch):
                answers += current.prefill([task.prompt for task in tasks[start : start + args.batch]]).generate(32)
            missed = [
                {"flags": flags, "prediction": answer.text}
                for task, answer, flags in zip(tasks, answers, commands, strict=True)
                if first_number(answer.text) != task.truth
            ]
            found = args.count - len(missed)
            low, high = wilson(found, args.count)
            device = jax.devices()[0]
            row = {
                "seq": seq, "method": method, "found": found, "count": args.count, "wilson95": [low, high],
                "device": f"{len(jax.devices())} x {device.device_kind}", "dtype": engine.model.dtype.name,
                "shards": engine.shards, "method_options": repr(answers[0].method), "notes": list(answers[0].notes),
                "versions": versions(), "missed": missed,
            }  # fmt: skip
            print(f"{seq:>4} {method:<6} {found}/{args.count}  95% [{low:.2f}, {high:.2f}]", flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                with (args.out / "needles.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""What every method keeps and loses on a real model: prepared with its tokenizer, run on one GPU, scored, drawn.

    python -m benchmarks.real_evidence prepare --data DIR --out samples.xz        # here: tokenizer, texts
    python -m benchmarks.real_evidence run --samples samples.xz --model FILE.gguf --out DIR --limit-s 540
    python -m benchmarks.real_evidence score --samples samples.xz --runs DIR      # here: answers to scores
    python -m benchmarks.real_evidence page                                       # docs/real_model.md and its pictures

``run`` needs neither tokenizer nor texts. Its units of work (a method at a length in a section) go to ``--workers``
processes that share the device, in the order of ``--sections``; a unit that a file in ``--out`` holds is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from apb_jax.command import Parser, command
from apb_jax.report import versions


def prepare_command(argv: list[str]) -> None:
    """Samples to one file of token ids."""
    parser = Parser(prog="python -m benchmarks.real_evidence prepare", description=prepare_command.__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="essays, SQuAD, HotpotQA")
    parser.add_argument("--samples", type=int, default=100, help="of each RULER task and length")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    from benchmarks.evidence.prepare import codec_of, jobs, prepare
    from benchmarks.evidence.samples import write_samples

    found, samples, started = jobs(args.model, args.data, args.samples, args.seed), [], time.perf_counter()
    for job, made in zip(found, prepare(found, args.processes), strict=True):
        samples += made
        seconds = time.perf_counter() - started
        print(f"{seconds:5.0f} s {job.kind} {job.task} at {job.length}: {len(made)} samples", flush=True)
    counts = {f"{kind} {length}": n for (kind, length), n in Counter((s.kind, s.length) for s in samples).items()}
    facts = {"model": args.model, "seed": args.seed, "variant": "ruler_fit", "template": "the model's own"}
    codec = codec_of(args.model)
    facts |= {"opening": len(codec.opening), "stop_ids": list(codec.stop_ids)}
    write_samples(args.out, samples, facts | {"counts": counts})
    print(f"{args.out}: {len(samples)} samples, {args.out.stat().st_size / 2**20:.1f} MiB")


def run_command(argv: list[str]) -> int:
    """Units of work on this machine's device, resumable."""
    from benchmarks.evidence.units import METHODS, SECTIONS, Wanted

    parser = Parser(prog="python -m benchmarks.real_evidence run", description=run_command.__doc__)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the model's GGUF file or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument(
        "--heads", type=Path, help="retaining heads; by default what the section heads leaves in the folder of the rows"
    )
    parser.add_argument("--dtype", choices=("bf16", "float32"))
    parser.add_argument(
        "--sections",
        default="ruler",
        help=f"in this order, with methods and lengths where given (ruler:full+apb@8192): {', '.join(SECTIONS)}",
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="in this order")
    parser.add_argument("--lengths", default="", help="only these")
    parser.add_argument("--count", type=int, help="samples of a task or texts of a unit at most")
    parser.add_argument("--receipt-count", type=int, default=20, help="the same for receipts and the sweep")
    parser.add_argument("--batch-tokens", type=int, default=52 * 8192, help="by default four of each task at 8K")
    parser.add_argument("--head-steps", type=int, default=1500)
    parser.add_argument("--head-hidden", type=int, default=128)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the device's memory for all workers")
    parser.add_argument("--limit-s", type=float, default=1e9, help="no batch begins after so many seconds")
    args = parser.parse_args(argv)
    methods, lengths = tuple(args.methods.split(",")), tuple(int(n) for n in args.lengths.split(",") if n)
    wrong = [name for name in methods if name not in METHODS]
    if wrong:
        parser.error(f"--methods: {wrong[0]!r} is none of {', '.join(METHODS)}")
    wanted = tuple(Wanted.parse(text, methods, lengths) for text in args.sections.split(","))
    started = time.time()
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{args.memory / args.workers:.3f}"
    from benchmarks.evidence.samples import read_samples
    from benchmarks.evidence.work import Run, claims_folder, start

    samples, facts = read_samples(args.samples)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(samples)} samples of {args.samples}, {facts['counts']}", flush=True)
    run = Run(
        args.samples, args.model, args.out, args.heads or args.out / "heads.safetensors", args.dtype, wanted,
        args.count, args.receipt_count, args.batch_tokens, args.head_steps, args.head_hidden, tuple(facts["stop_ids"]),
        facts["opening"], started + args.limit_s, claims_folder(),
    )  # fmt: skip
    record = {
        "started": started, "arguments": without_paths(argv), "versions": versions(), "device": device_name(),
        "facts": facts,
    }  # fmt: skip
    with (args.out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{record['device']}, {record['versions']}", flush=True)
    failed = start(run, args.workers)
    print(f"{time.time() - started:.0f} s, {failed} of {args.workers} workers failed", flush=True)
    return 1 if failed else 0


def score_command(argv: list[str]) -> None:
    """Rows to figures: one JSON line a cell."""
    parser = Parser(prog="python -m benchmarks.real_evidence score", description=score_command.__doc__)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_evidence.jsonl"))
    parser.add_argument("--add", action="store_true", help="keep the cells of --out of which the rows hold nothing")
    args = parser.parse_args(argv)
    from apb_jax.files import write_text
    from benchmarks.evidence.prepare import codec_of
    from benchmarks.evidence.samples import read_samples
    from benchmarks.evidence.score import beside, figures
    from benchmarks.evidence.work import rows_of

    samples, facts = read_samples(args.samples)
    runs = [json.loads(line) for line in (args.runs / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = [run | {"arguments": without_paths(run["arguments"])} for run in runs]
    found = list(figures(samples, rows_of(args.runs), codec_of(facts["model"]).decode))
    if args.add:
        before, *cells = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
        runs, found = before["runs"] + [run for run in runs if run not in before["runs"]], beside(found, cells)
    lines = [{"section": "facts", "samples": facts, "runs": runs}, *found]
    write_text(args.out, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    print(f"{args.out}: {len(found)} cells of {len(runs)} runs")


def page_command(argv: list[str]) -> None:
    """Figures to docs/real_model.md and its pictures."""
    parser = Parser(prog="python -m benchmarks.real_evidence page", description=page_command.__doc__)
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/results/real_evidence.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/real_model.md"))
    args = parser.parse_args(argv)
    from benchmarks.evidence.page import write_page

    for path in write_page(args.figures, args.out, args.out.parent / "pictures"):
        print(path)


PATHS = {"--samples": "samples.xz", "--model": "FILE.gguf", "--out": "ROWS", "--heads": "heads.safetensors"}
"""What stands for a machine's own paths in what is kept."""


def without_paths(arguments: Sequence[str]) -> list[str]:
    """A command line as others may type it."""
    return [PATHS.get(before, word) for before, word in zip(("", *arguments), arguments, strict=False)]


def device_name() -> str:
    """What a process of its own sees: the parent must not hold the device."""
    code = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@command("python -m benchmarks.real_evidence")
def main(argv: list[str]) -> int | None:
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "prepare": prepare_command,
        "run": run_command,
        "score": score_command,
        "page": page_command,
    }
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nCommands, each with --help: {', '.join(commands)}")
        return 0
    if name not in commands:
        Parser(prog="python -m benchmarks.real_evidence", description=__doc__).error(
            f"{name!r} is no command; there are: {', '.join(commands)}"
        )
    return commands[name](argv[1:])


if __name__ == "__main__":
    sys.exit(main())

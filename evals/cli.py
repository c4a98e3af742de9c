"""The command line ``python -m evals``: what to measure, on what, where to put it."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from apb_jax.arguments import count, lengths, one_of, output_folder, seed, shards, tensor_devices
from apb_jax.command import Parser, command
from apb_jax.files import read_json, read_text, write_text
from apb_jax.joining import Joining
from apb_jax.json_text import parse_json
from apb_jax.options import add_joining, add_precision
from apb_jax.precision import Precision
from apb_jax.synthetic.packaged import NOVEL
from evals.base import EvalError, Generator, LogProbs, SystemSpec, Task, require_choice
from evals.datahelp import WHERE
from evals.infinitebench import records as ib_records
from evals.infinitebench.prompts import SETS
from evals.infinitebench.scoring import RULES
from evals.infinitebench.task import InfiniteBenchTask
from evals.latency.task import LatencyPlan, minference_table, run_latency
from evals.needle.four import FourNeedlesTask
from evals.needle.task import FORMS, HeatmapTask, even_depths
from evals.perplexity.task import PROTOCOLS, PerplexityPlan, run_perplexity
from evals.predictions import score_file
from evals.report import write_report
from evals.ruler import EXTRA_TASKS, TASKS, VARIANTS, RulerTask, corpus, needed_text
from evals.ruler.prompt import wrapper_names
from evals.runner import check_length, environment, run_config, run_tasks
from evals.store import RunFolder
from evals.tables import print_metrics
from evals.tokens import Tokens

LONG_ENOUGH = 16384
"""Above this length every RULER task has room for its smallest prompt, whatever the tokenizer."""

COMMANDS = ("ruler", "infinitebench", "needle", "perplexity", "latency", "report", "score", "lm_eval", "data")


class System(Generator, LogProbs, Protocol):
    """A system under test as the command line needs it: it answers, scores given tokens, and lends its tokenizer."""

    tokens: Tokens


Connect = Callable[[SystemSpec], Callable[[str], System]]
"""Loads a model and returns a function from a method's name to the system that runs it."""


def main(argv: Sequence[str], *, connect: Connect) -> int:
    """Run one command; 0 on success, 2 on wrong input after one line on stderr.

    Args:
      connect: loads the model when a command needs one.
    """

    @command("python -m evals", resumes="; repeat the command to go on where it stopped")
    def run(argv: list[str]) -> None:
        if argv and not argv[0].startswith("-"):
            require_choice("command", argv[0], COMMANDS)
        args = _parser().parse_args(argv)
        args.run(args, connect)

    return run(argv)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evals", description="Long-context benchmarks with scores one may compare.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    ruler = _benchmark(commands, "ruler", "the 13 RULER tasks", _ruler)
    ruler.add_argument("--tasks", help="names separated by commas (default: all that the data at hand allow)")
    ruler.add_argument("--samples", type=count(1), default=500, help="samples per task and length (default: 500)")
    ruler.add_argument("--variant", default="ruler_main", help=f"published program to follow: {', '.join(VARIANTS)}")
    ruler.add_argument("--wrapper", default="base", help=f"chat wrapper: {', '.join(wrapper_names())}")
    ruler.add_argument("--splitter", default="untrained", help="sentence splitter for essays: untrained, english")

    bench = _benchmark(commands, "infinitebench", "the 12 InfiniteBench tasks", _infinitebench)
    bench.add_argument("--tasks", help="names separated by commas (default: all)")
    bench.add_argument("--samples", type=count(1), help="most records per task (default: all)")
    bench.add_argument("--template", default="yarn", help=f"template set: {', '.join(SETS)}")
    bench.add_argument("--rule", default="official", help=f"whose scorer: {', '.join(RULES)}")

    needle = _benchmark(commands, "needle", "needle in a haystack: heat map, or STRING's four needles", _needle)
    needle.add_argument(
        "--depths", type=count(1, 1000), default=10, help="depths of the heat map from 0 to 100%% (default: 10)"
    )
    needle.add_argument("--rounds", type=count(1, 100_000), default=1, help="samples per cell (default: 1)")
    needle.add_argument("--form", default="ruler", help=f"wording: {', '.join(FORMS)}")
    needle.add_argument("--four", type=count(1), metavar="N", help="run N four-needle tests instead of the heat map")
    needle.add_argument("--text", help="haystack file instead of the essays or the packaged novel")

    for asked in (ruler, bench, needle):
        asked.add_argument(
            "--batch", type=count(1, 4096), default=1, help="samples answered together, the same rows (default: 1)"
        )

    ppl = _benchmark(commands, "perplexity", "perplexity of long text", _perplexity)
    ppl.add_argument("--text", help="text files separated by commas (default: the packaged novel)")
    ppl.add_argument("--window", type=count(1), default=512, help="tokens scored per prefill (default: 512)")
    ppl.add_argument("--protocol", default="tail", help=f"which tokens are scored: {', '.join(PROTOCOLS)}")

    speed = _benchmark(commands, "latency", "prefill and decode times over lengths", _latency)
    speed.add_argument("--repeats", type=count(1, 100_000), default=5, help="timed runs per length (default: 5)")
    speed.add_argument("--warmups", type=count(0, 100_000), default=1, help="untimed runs before (default: 1)")
    speed.add_argument("--new-tokens", type=count(1), help="tokens generated; 1 times prefill and query (default: 32)")
    speed.add_argument(
        "--no-kv", action="store_false", dest="kv", help="time the prefill alone and keep no KV, as MInference's table"
    )
    speed.add_argument("--baseline", help="a method of the run: adds columns with the ratio to it")
    speed.add_argument("--text", help="text file that is repeated (default: the packaged novel)")

    report = commands.add_parser("report", help="Markdown, plots and one HTML page from run folders")
    report.add_argument("folders", nargs="+", metavar="DIR")
    report.add_argument("--out", type=output_folder, help="folder for the report (default: the first DIR)")
    report.set_defaults(run=lambda args, connect: _report(args))

    score = commands.add_parser("score", help="score predictions made elsewhere")
    score.add_argument("benchmark", help="ruler or infinitebench")
    score.add_argument("--task", required=True)
    score.add_argument("--rule", default="official", help=f"InfiniteBench only: {', '.join(RULES)}")
    score.add_argument("--json", action="store_true", help="print one JSON line")
    score.add_argument("file", metavar="FILE.jsonl")
    score.set_defaults(run=lambda args, connect: _score(args))

    commands.add_parser("lm_eval", help="lm-evaluation-harness with the model apb_jax; takes its arguments")
    data = commands.add_parser("data", help="where to get the benchmarks' data")
    data.set_defaults(run=lambda args, connect: print(WHERE))
    return parser


def _benchmark(commands, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--model", required=True, help="model name or folder")
    parser.add_argument("--method", default="apb", help="attention methods separated by commas, or auto")
    parser.add_argument("--seq", type=lengths, required=True, help="tokens, by commas: 4k,8k")
    parser.add_argument("--out", type=output_folder, required=True, help="folder; repeat the command to resume")
    parser.add_argument("--data", help="folder with the benchmark's data (see `python -m evals data`)")
    parser.add_argument("--seed", type=seed, default=42, help="of the samples")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.NAME=VALUE", help="option of a method")
    parser.add_argument("--weights", help="folder of other weights, or 'random'")
    parser.add_argument("--heads", help="file with retaining heads")
    parser.add_argument("--dtype", type=one_of(("bf16", "float32")), help="bf16 or float32")
    add_precision(parser)
    parser.add_argument(
        "--sp", type=shards, help="devices along the sequence (default: all GPUs; without a GPU as apb_jax.run)"
    )
    parser.add_argument("--tp", type=tensor_devices, default=1, help="devices along the heads")
    parser.add_argument(
        "--shards",
        "--virtual-shards",
        type=shards,
        help="parts of the document, a multiple of --sp (default: --sp; on one device 8 where a method needs them)",
    )
    add_joining(parser)
    parser.set_defaults(run=run)
    return parser


def _spec(args: argparse.Namespace) -> SystemSpec:
    methods = tuple(dict.fromkeys(name.strip() for name in args.method.split(",") if name.strip()))
    if not methods:
        raise EvalError("--method names no method")
    options: dict[str, dict[str, Any]] = {}
    for item in args.set:
        found = re.fullmatch(r"([^.=]+)\.([^.=]+)=(.+)", item)
        if not found or found.group(1) not in methods:
            raise EvalError(f"--set {item!r}: expected METHOD.NAME=VALUE with METHOD one of {', '.join(methods)}")
        options.setdefault(found.group(1), {})[found.group(2)] = _value(found.group(3))
    joining = Joining(args.coordinator, args.processes, args.process)
    precision = Precision.of(
        args.precision, weights=args.weights_dtype, kv=args.kv_dtype, attention=args.attention_dtype
    )
    where = (args.sp, args.tp, args.shards, max(args.seq), joining, precision)
    return SystemSpec(args.model, methods, options, args.weights, args.heads, args.dtype, *where)


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _names(text: str | None, what: str, legal: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    if text is None:
        return tuple(default)
    return tuple(dict.fromkeys(require_choice(what, name.strip(), legal) for name in text.split(",")))


def _haystack(args: argparse.Namespace) -> tuple[str, str]:
    """(text, name) of the haystack: --text, else the essays of --data, else the packaged novel."""
    if args.text:
        return read_text(args.text, "--text"), Path(args.text).name
    if args.data:
        path = corpus.find(args.data, "essays")
        return _essays(path), path.name
    return read_text(NOVEL, "the novel"), NOVEL.name


def _essays(path: Path) -> str:
    record = read_json(path, "--data")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise EvalError(f'--data: {path} does not hold {{"text": ...}}')
    return record["text"]


# -- benchmarks -------------------------------------------------------------------------------------------------------


def _run_methods(args: argparse.Namespace, connect: Connect, benchmark: str, run: Callable) -> dict[str, Any]:
    """``run(system, folder_path, console)`` for every method; returns the metrics by method and prints them."""
    spec = _spec(args)
    console = Console(stderr=True)
    system_of = connect(spec)
    systems = {method: system_of(method) for method in spec.methods}  # a refusal comes before the first sample
    metrics = {m: run(system, Path(args.out) / m, console, m) for m, system in systems.items()}
    print_metrics(benchmark, metrics, Console())
    print(f"runs in {args.out}; plots and page: python -m evals report {args.out}")
    return metrics


def _run_task_benchmark(args, connect, benchmark: str, make_tasks: Callable[[System], list[Task]], samples) -> None:
    def run(system, path, console, method):
        tasks = make_tasks(system)
        for task in tasks:  # before the folder holds anything
            check_length(system, task.length, f"{task.name} at length {task.length}")
        with RunFolder(path, run_config(benchmark, system, tasks, samples)) as folder:
            return run_tasks(system, tasks, folder, samples=samples, console=console, label=method, batch=args.batch)

    _run_methods(args, connect, benchmark, run)


def _ruler(args, connect: Connect) -> None:
    samples, lengths = args.samples, args.seq
    names = _names(args.tasks, "RULER task", (*TASKS, *EXTRA_TASKS), ())
    if not names:
        names = TASKS if args.data else tuple(task for task in TASKS if needed_text(task) is None)
        left_out = [task for task in TASKS if task not in names]
        if left_out:
            print(f"without --data these tasks are left out: {', '.join(left_out)} (see `python -m evals data`)")

    def make(tokens: Any) -> list[Task]:
        return [
            RulerTask(
                name,
                tokens,
                length,
                samples,
                seed=args.seed,
                variant=args.variant,
                wrapper=args.wrapper,
                data=args.data,
                splitter=args.splitter,
            )
            for length in lengths
            for name in names
        ]

    make(len)  # bad options are refused before a model is loaded

    def make_checked(system: System) -> list[Task]:
        return [task for task in make(system.tokens) if _fits(task, asked_for=args.tasks is not None)]

    _run_task_benchmark(args, connect, "ruler", make_checked, samples)


def _fits(task: Task, asked_for: bool) -> bool:
    """Whether a short length holds the task's smallest prompt; a task asked for by name that does not fit is an error.

    Said before hours are spent. 30 repetitions of ten words fill 4K where a tokenizer spends four tokens on a word.
    """
    if task.length > LONG_ENOUGH:
        return True
    try:
        next(iter(task.examples()))
    except EvalError as error:
        if asked_for:
            raise
        print(f"left out: {error}")
        return False
    return True


def _infinitebench(args, connect: Connect) -> None:
    samples, lengths = args.samples, args.seq
    names = _names(args.tasks, "InfiniteBench task", ib_records.TASKS, ib_records.TASKS)

    def make(tokens: Any) -> list[Task]:
        return [
            InfiniteBenchTask(name, tokens, length, args.data, args.template, args.rule)
            for length in lengths
            for name in names
        ]

    make(None)
    _run_task_benchmark(args, connect, "infinitebench", lambda system: make(system.tokens), samples)


def _needle(args, connect: Connect) -> None:
    lengths = args.seq
    text, name = _haystack(args)
    depths = even_depths(args.depths)

    def make(tokens: Any) -> list[Task]:
        if args.four:
            return [FourNeedlesTask(tokens, text, name, length, args.four, args.seed) for length in lengths]
        return [
            HeatmapTask(tokens, text, name, length, depths, args.rounds, args.seed, args.form) for length in lengths
        ]

    make(None)
    samples = args.four or args.depths * args.rounds
    _run_task_benchmark(args, connect, "needle", lambda system: make(system.tokens), samples)


def _perplexity(args, connect: Connect) -> None:
    lengths = args.seq
    paths = args.text.split(",") if args.text else [NOVEL]
    stems = [Path(path).stem for path in paths]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise EvalError(f"--text: {len(twice)} files are called {twice[0]!r}; rows go by that name, so rename one")
    texts = {Path(path).stem: read_text(path, "--text") for path in paths}

    def make(tokens: Any) -> PerplexityPlan:
        return PerplexityPlan(tokens, texts, lengths, args.window, args.protocol)

    make(None)

    def run(system, path, console, method):
        plan = make(system.tokens)
        config = {**_plain_config("perplexity", system), **plan.describe()}
        with RunFolder(path, config) as folder:
            return run_perplexity(system, plan, folder, console=console, label=method)

    _run_methods(args, connect, "perplexity", run)


def _latency(args, connect: Connect) -> None:
    path = Path(args.text) if args.text else NOVEL
    if not args.kv and args.new_tokens is not None:
        raise EvalError(
            f"--new-tokens {args.new_tokens} asks for an answer, and --no-kv leaves none; drop one of the two"
        )
    text, new_tokens = read_text(path, "--text"), args.new_tokens or (32 if args.kv else 1)
    plan = LatencyPlan(text, path.name, args.seq, args.repeats, args.warmups, new_tokens, args.kv)
    spec = _spec(args)
    if args.baseline is not None:
        require_choice("baseline (a method of this run)", args.baseline, spec.methods)

    def run(system, path, console, method):
        config = {**_plain_config("latency", system), "baseline": args.baseline, **plan.describe()}
        with RunFolder(path, config) as folder:
            return run_latency(system, plan, folder, console=console, label=method)

    metrics = _run_methods(args, connect, "latency", run)
    prefill = {method: {r["length"]: r["prefill_s"] for r in m["results"]} for method, m in metrics.items()}
    write_text(Path(args.out) / "res.csv", minference_table(prefill))


def _plain_config(benchmark: str, system: System) -> dict[str, Any]:
    config = run_config(benchmark, system, [], None)
    return {**config, "environment": environment()}


# -- without a model --------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> None:
    out = Path(args.out or args.folders[0])
    for path in write_report([Path(folder) for folder in args.folders], out):
        print(path)


def _score(args: argparse.Namespace) -> None:
    require_choice("benchmark", args.benchmark, ("ruler", "infinitebench"))
    result = score_file(args.benchmark, args.task, args.file, args.rule)
    if args.json:
        print(json.dumps({name: result[name] for name in ("task", "metric", "score", "samples")}))
        return
    nulls = f", empty predictions {result['empty_predictions']}" if "empty_predictions" in result else ""
    print(f"{result['task']}: {result['score']:.2f} ({result['metric']}, {result['samples']} samples{nulls})")

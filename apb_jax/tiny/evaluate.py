"""``python -m apb_jax.tiny.evaluate --out DIR``: the model card's table, through the public engine.

Methods: every one that ``--method`` knows, with the sizes that it takes for the packaged model; APB with the trained
heads, with the training-free scorer, with random heads, and with nothing passed (anchor only). Samples have fresh
seeds, key words held out from training, and the packaged haystacks (and the held-out end of ``--data``). A cell that is
in DIR already is not measured again, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

import apb_jax
from apb_jax.arguments import count, one_of, output_folder, seed, shards
from apb_jax.attention import AttentionMethod
from apb_jax.attention.registry import METHODS as REGISTRY
from apb_jax.attention.registry import MethodSpec
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import read_json, write_json, write_text
from apb_jax.retaining.train import hf_heads, initial_heads
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.grading import is_correct, wilson
from apb_jax.synthetic.haystack import Haystack, filler, novel, read_text, split_held_out
from apb_jax.synthetic.sample import tokens_of
from apb_jax.synthetic.tasks import TASKS, World
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny import QUERY_AT
from apb_jax.tiny.tokenizer import BOS_ID

APB_FORMS = ("apb-heads", "apb-query", "apb-random", "anchor-only")
METHODS = ("full", *APB_FORMS, *(name for name in REGISTRY if name not in ("full", "apb")))
CARD_TASKS = ("single", "passkey", "multikey", "multivalue", "vt", "update")
NEW_TOKENS = 64
HEADS_HIDDEN = 256


@dataclass(frozen=True)
class Budget:
    """APB's sizes for a document of ``tokens`` on ``shards``: a quarter and an eighth of a block, as in the paper."""

    anchor_tokens: int
    passing_tokens: int

    @classmethod
    def of(cls, tokens: int, shards: int) -> Budget:
        """Rounded down to whole tokens; an anchor of at least 128, so that it holds the query."""
        block = -(-tokens // shards)
        return cls(max(128, block // 4), max(64, block // 8))


@dataclass(frozen=True)
class Item:
    """One prompt as token ids, and the values its answer must consist of."""

    document: np.ndarray
    query: np.ndarray
    values: tuple[str, ...]


def items(
    task: str, tokens: int, count: int, seed: int, encoder: Encoder, haystacks: tuple[Haystack, ...]
) -> list[Item]:
    """``count`` fresh samples; the same for every method."""
    rng = np.random.default_rng([seed, tokens, sum(map(ord, task))])
    world = World(rng, encoder, vocabulary(held_out=True), haystacks)
    out = []
    for _ in range(count):
        sample = TASKS[task](world, tokens - 1)
        question = sample.questions[int(rng.integers(len(sample.questions)))]
        document = np.concatenate([[BOS_ID], tokens_of(sample.document, encoder)]).astype(np.int32)
        out.append(Item(document, tokens_of((question.text,), encoder), question.values))
    return out


def method_of(name: str, tokens: int, shards: int, given: Budget | None) -> apb_jax.APB | MethodSpec:
    """The method behind a row of the table, for documents of ``tokens`` on ``shards`` shards."""
    if name not in APB_FORMS:
        return MethodSpec(name)
    budget = given or Budget.of(tokens, shards)
    return apb_jax.APB(
        anchor_tokens=budget.anchor_tokens,
        passing_tokens=0 if name == "anchor-only" else budget.passing_tokens,
        query_at=QUERY_AT,
        scorer="query" if name == "apb-query" else "heads",
    )


def shards_of(name: str, shards: int) -> int:
    """Shards that a row of the table runs on: one where the method (or full attention) knows no more."""
    return shards if name in APB_FORMS or (name != "full" and REGISTRY[name].can.max_shards != 1) else 1


def make_engine(model: Any, shards: int) -> apb_jax.Engine:
    """An engine on ``shards`` devices, or on one device with all of them where there is only one."""
    if len(jax.devices()) == 1:
        return apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1), shards=shards)
    return apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=shards))


def measure(engine: Any, samples: list[Item], batch: int, expect: str) -> tuple[int, list[str], AttentionMethod]:
    """(how many are correct, predictions, the last batch's method with all its sizes)."""
    correct, texts = 0, []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        answers = engine.generate(
            document=[s.document for s in part], query=[s.query for s in part], max_new_tokens=NEW_TOKENS
        )
        for sample, answer in zip(part, answers, strict=True):
            if answer.method.name != expect:
                raise UserError(
                    f"a document of {len(sample.document)} tokens ran under {answer.method.name}: {answer.notes}"
                )
            text = answer.text or engine.codec.decode(answer.tokens)
            texts.append(text)
            correct += is_correct(text, sample.values)
    return correct, texts, answers[-1].method


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """For each length a table with a row per method and a column per task: percent [95% Wilson interval]."""
    lines = []
    for tokens in sorted({cell["tokens"] for cell in cells.values()}):
        here = {(c["method"], c["task"]): c for c in cells.values() if c["tokens"] == tokens}
        tasks = list(dict.fromkeys(task for _, task in here))
        lines += ["| " + " | ".join((f"{tokens} tokens", *tasks)) + " |", "|---|" + "---|" * len(tasks)]
        for method in (name for name in METHODS if any(name == used for used, _ in here)):
            shown = (share(here[method, task]) if (method, task) in here else "" for task in tasks)
            lines.append("| " + " | ".join((method, *shown)) + " |")
        lines.append("")
    return "\n".join(lines)


def share(cell: dict[str, Any]) -> str:
    """Percent answered exactly [95% Wilson interval]."""
    low, high = wilson(cell["correct"], cell["count"])
    return f"{100 * cell['correct'] / cell['count']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def check_cells(report: Any, path: Path) -> None:
    """Refuse a file of cells that this command did not write."""
    cells = report.get("cells") if isinstance(report, dict) else None
    if not isinstance(cells, dict):
        raise UserError(f"{path} holds no cells; choose another --out")
    for name, cell in cells.items():
        if not _whole_cell(cell):
            raise UserError(f"{path}: the cell {name!r} is damaged; remove it, or choose another --out")


def _whole_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not all(isinstance(cell.get(field), str) for field in ("method", "task")):
        return False
    tokens, correct, samples = (cell.get(field, -1) for field in ("tokens", "correct", "count"))
    return all(type(n) is int for n in (tokens, correct, samples)) and 0 <= correct <= samples and samples > 0


def run(args: argparse.Namespace, console: Console) -> None:
    """The command behind ``main``."""
    model = apb_jax.load(args.model, heads=args.heads, dtype=args.dtype)
    if model.tokenizer is None:
        raise UserError(f"model {args.model} has no tokenizer; the tasks are text")
    random = None
    if "apb-random" in args.methods:
        with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
            save_file(hf_heads(initial_heads(model.config, HEADS_HIDDEN, args.seed)), file.name)
        random = apb_jax.load(args.model, heads=file.name, dtype=args.dtype)
    given = None
    if args.anchor is not None or args.passing is not None:
        if args.anchor is None or args.passing is None:
            raise UserError("--anchor and --passing go together; one of them is missing")
        given = Budget(args.anchor, args.passing)
    encoder = Encoder(model.tokenizer)
    haystacks = (filler(), novel(), *(split_held_out(read_text(path))[1] for path in args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.json"
    report: dict[str, Any] = {"cells": {}}
    if path.exists():
        report = read_json(path, "cells")
        check_cells(report, path)
    cells = report["cells"]
    measured_on = {
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "dtype": model.dtype.name,
        "jax": jax.__version__,
        "seed": args.seed,
    }
    engines: dict[tuple[bool, int], apb_jax.Engine] = {}
    for tokens in args.lengths:
        samples = {task: items(task, tokens, args.samples, args.seed, encoder, haystacks) for task in args.tasks}
        for method in args.methods:
            for task in args.tasks:
                name = f"{method}/{task}/{tokens}"
                if cells.get(name, {}).get("count", 0) >= args.samples:
                    continue
                began = time.perf_counter()
                key = (method == "apb-random", shards_of(method, args.sp))
                if key not in engines:
                    engines[key] = make_engine(random if key[0] else model, key[1])
                engine = engines[key].with_method(method_of(method, tokens, args.sp, given))
                correct, texts, used = measure(
                    engine, samples[task], args.batch, "apb" if method in APB_FORMS else engine.method.name
                )
                cells[name] = {
                    "method": method, "task": task, "tokens": tokens, "correct": correct, "count": len(texts),
                    "shards": engine.shards,
                    "options": vars(used),
                    "seconds": round(time.perf_counter() - began, 2),
                    **measured_on,
                }  # fmt: skip
                console.print(f"{name:32s} {correct}/{len(texts)}  {cells[name]['seconds']} s", highlight=False)
                write_json(path, report)
                write_text(args.out / "table.md", markdown(cells))
    print(markdown(cells))


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.tiny.evaluate", description=__doc__)
    parser.add_argument("--out", type=output_folder, required=True, help="folder for cells.json and table.md")
    parser.add_argument("--model", default="tiny", help="preset or folder")
    parser.add_argument("--heads", type=Path, help="other retaining heads than the model's own")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="real text, as for apb_jax.tiny.train")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), type=one_of(METHODS), help=", ".join(METHODS))
    parser.add_argument("--tasks", nargs="+", default=list(CARD_TASKS), type=one_of(TASKS), help=", ".join(TASKS))
    parser.add_argument("--lengths", type=count(512), nargs="+", default=[4096, 8192], help="tokens of documents")
    parser.add_argument("--samples", type=count(1), default=64, help="per cell")
    parser.add_argument("--batch", type=count(1, 65536), default=16, help="documents at once")
    parser.add_argument("--sp", type=shards, default=8, help="shards")
    parser.add_argument("--anchor", type=count(0), help="anchor tokens (default: a quarter of a block)")
    parser.add_argument("--passing", type=count(0), help="passing tokens (default: an eighth of a block)")
    parser.add_argument(
        "--dtype", type=one_of(("bf16", "float32")), help="of the model (default: bf16 on a GPU, float32 elsewhere)"
    )
    parser.add_argument("--seed", type=seed, default=2_000_000, help="of the samples")
    return parser


@command("python -m apb_jax.tiny.evaluate", resumes="; the same command goes on with the next cell")
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    run(make_parser().parse_args(argv), Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())

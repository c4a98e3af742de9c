"""One prefill for many questions: APB without the question, APB that knows it, and full attention.

    python -m benchmarks.ask_many --tokens 8192 --documents 8 --out benchmarks/results/ask_many.jsonl
    python -m benchmarks.ask_many --model smollm2-135m --squad FILE --tokens 2048 --shards 4 --documents 3

Up to eight questions a document: synthetic tasks in turn (``ask_many_documents``), or with ``--squad`` paragraphs of a
file in SQuAD's layout. A method that knows the question prefills for every one of them; the others prefill a document
once. All rows answer a document before the next one is begun, so that a run that ``--limit-s`` ends is fair. The first
document is answered once before the clock runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

import apb_jax
from apb_jax.attention.registry import MethodSpec
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.report import versions
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.grading import wilson
from benchmarks.ask_many_documents import MERGED, Paper, squad, synthetic

NEW_TOKENS = 64
"""A chain of five variables takes about forty."""
FORMS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full, one prefill": ("full", {}, True),
    "apb, question in the anchor (heads)": ("apb", {"scorer": "heads"}, False),
    "apb, question in the anchor (query)": ("apb", {"scorer": "query"}, False),
    "apb without the question (heads)": ("apb", {"scorer": "heads", "embed_query": False}, True),
    "apb without the question (expected)": ("apb", {"scorer": "expected", "embed_query": False}, True),
    "apb without the question (reconstruct)": ("apb", {"scorer": "reconstruct", "embed_query": False}, True),
    "apb without the question, nothing passed": ("apb", {"passing_tokens": 0, "embed_query": False}, True),
}
"""Row of the table -> method, its options, and whether one prefill serves every question of a document."""


@dataclass
class Tally:
    """What one row got so far."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    prefill_s: float = 0.0
    asking_s: float = 0.0

    def share(self, task: str | None = None) -> str:
        """Right answers of one task or all, with Wilson's 95% interval."""
        count = self.asked[task] if task else self.asked.total()
        right = self.right[task] if task else self.right.total()
        low, high = wilson(right, count)
        return f"{right}/{count} [{low:.0%}, {high:.0%}]"


def answer_all(engine: apb_jax.Engine, paper: Paper, once: bool, tally: Tally) -> None:
    """Every question about one document."""
    session = None
    for asked in paper.questions:
        prompt = engine.prompt(paper.document, asked.query)
        if session is None or not once:
            session = engine.prefill([prompt])
            tally.prefill_s += session.prefill_s
        if session.method.name != engine.method.name:
            raise UserError(f"{len(prompt.document)} tokens ran under {session.method.name}: {session.notes}")
        answer = session.ask(asked.query, NEW_TOKENS)
        assert isinstance(answer, apb_jax.Answer)
        tally.asking_s += answer.query_s + answer.decode_s
        tally.asked[asked.task] += 1
        tally.right[asked.task] += asked.right(answer.text)


@command("python -m benchmarks.ask_many")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--squad", type=Path, metavar="FILE")
    parser.add_argument("--tasks", default=",".join(MERGED), help="whose documents take turns")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--questions", type=int, default=8, help="of a SQuAD document")
    parser.add_argument("--shards", type=int, default=8, help="on one device")
    parser.add_argument("--rows", default="", help="only rows whose name holds one of these, separated by ';'")
    parser.add_argument("--seed", type=int, default=11_000_000, help="training used other seeds")
    parser.add_argument("--limit-s", type=float, default=1e9, help="CPU seconds after which no document is begun")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    base = apb_jax.Engine(apb_jax.load(args.model), "full", apb_jax.make_mesh(sp=1), shards=args.shards)
    assert base.codec is not None
    tokenizer = base.codec.tokenizer
    if args.squad:
        length = lambda text: len(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
        papers = squad(args.squad, length, args.tokens, args.questions, args.documents)
    else:
        papers = synthetic(Encoder(tokenizer), args.tokens, args.documents, args.seed, args.tasks.split(","))
    heads = base.model.retaining_hidden is not None
    chosen = {
        name: form for name, form in FORMS.items()
        if any(part in name for part in args.rows.split(";")) and (heads or form[1].get("scorer") != "heads")
    }  # fmt: skip
    engines = {name: base.with_method(MethodSpec(method, options)) for name, (method, options, _) in chosen.items()}
    tallies = {name: Tally() for name in chosen}
    done = 0
    for paper in papers:
        for name, (_, _, once) in chosen.items():
            if not done:
                first = Paper(paper.document, paper.questions[:1])
                answer_all(engines[name], first, once, Tally())
            answer_all(engines[name], paper, once, tallies[name])
            print(f"document {done}: {name}: {tallies[name].share()}", file=sys.stderr, flush=True)
        done += 1
        if time.process_time() > args.limit_s:
            break
    tasks = sorted(tallies[next(iter(chosen))].asked)
    print(f"| method | prefills | right [95%] | {' | '.join(tasks)} | prefill s a document | answer s a question |")
    print("|" + "---|" * (len(tasks) + 5))
    for name, tally in tallies.items():
        method, options, once = chosen[name]
        count = tally.asked.total()
        by_task = " | ".join(f"{tally.right[task]}/{tally.asked[task]}" for task in tasks)
        prefills = done if once else count
        print(
            f"| {name} | {prefills} | {tally.share()} | {by_task} | {tally.prefill_s / done:.2f} "
            f"| {tally.asking_s / count:.3f} |", flush=True,
        )  # fmt: skip
        row = {
            "name": name, "method": method, "options": options, "tokens": args.tokens, "documents": done,
            "shards": engines[name].shards, "prefills": prefills, "right": tally.right.total(),
            "count": count, "wilson95": wilson(tally.right.total(), count), "by_task": {
                task: [tally.right[task], tally.asked[task]] for task in tasks
            }, "prefill_s_a_document": tally.prefill_s / done, "answer_s_a_question": tally.asking_s / count,
            "cpu_s_of_the_run": time.process_time(), "seed": args.seed, "squad": bool(args.squad),
            "model": args.model, "dtype": base.model.dtype.name, "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }  # fmt: skip
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())

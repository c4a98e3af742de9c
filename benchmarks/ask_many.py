"""One prefill for many questions: APB without the question, APB that knows it, and full attention.

    python benchmarks/ask_many.py --tokens 4096 --documents 4 --questions 8 --out benchmarks/results/ask_many.jsonl

Needles for many keys in one document (``synthetic/tasks.py``, key words held out from training), each asked for. A
method that knows the question prefills for every one of them; the others prefill a document once. The first document
is answered twice and not timed the first time, so that seconds hold no compilation.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import apb_jax
from apb_jax.attention.registry import MethodSpec
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.report import versions
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.grading import is_correct, wilson
from apb_jax.synthetic.haystack import filler, novel
from apb_jax.synthetic.sample import Sample, tokens_of
from apb_jax.synthetic.tasks import World, needles
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny.tokenizer import BOS_ID

NEW_TOKENS = 32
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


def documents(count: int, tokens: int, questions: int, seed: int, encoder: Encoder) -> list[Sample]:
    """Fresh documents with a needle for every question; the same for every method."""
    rng = np.random.default_rng([seed, tokens])
    world = World(rng, encoder, vocabulary(held_out=True), (filler(), novel()))
    return [needles(world, tokens - 1, questions, "ask_many") for _ in range(count)]


def answer_all(engine: apb_jax.Engine, sample: Sample, encoder: Encoder, once: bool) -> tuple[list[bool], float, float]:
    """(which answers are right, seconds of prefill, seconds of query and decoding) of one document's questions."""
    document = np.concatenate([[BOS_ID], tokens_of(sample.document, encoder)]).astype(np.int32)
    right, prefill_s, asking_s, session = [], 0.0, 0.0, None
    for question in sample.questions:
        ids = tokens_of((question.text,), encoder)
        if session is None or not once:
            session = engine.prefill([engine.prompt(document, ids)])
            prefill_s += session.prefill_s
        if session.method.name != engine.method.name:
            raise UserError(f"a document of {len(document)} tokens ran under {session.method.name}: {session.notes}")
        answer = session.ask(ids, NEW_TOKENS)
        assert isinstance(answer, apb_jax.Answer)
        asking_s += answer.query_s + answer.decode_s
        right.append(is_correct(answer.text, question.values))
    return right, prefill_s, asking_s


@command("python benchmarks/ask_many.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--shards", type=int, default=8, help="on one device")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--seed", type=int, default=11_000_000, help="training used other seeds")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    base = apb_jax.Engine(apb_jax.load("tiny"), "full", apb_jax.make_mesh(sp=1), shards=args.shards)
    assert base.codec is not None
    encoder = Encoder(base.codec.tokenizer)
    samples = documents(args.documents, args.tokens, args.questions, args.seed, encoder)
    print("| method | prefills a document | right [95%] | prefill s a document | query and decoding s a question |")
    print("|---|---|---|---|---|")
    for name, (method, options, once) in ((name, form) for name, form in FORMS.items() if args.rows in name):
        engine = base.with_method(MethodSpec(method, options))
        answer_all(engine, samples[0], encoder, once)
        began = time.perf_counter()
        found = [answer_all(engine, sample, encoder, once) for sample in samples]
        right = [one for rights, _, _ in found for one in rights]
        low, high = wilson(sum(right), len(right))
        prefills = 1 if once else args.questions
        prefill_s = sum(s for _, s, _ in found) / len(samples)
        asking_s = sum(s for _, _, s in found) / len(right)
        shown = f"{sum(right)}/{len(right)} [{low:.0%}, {high:.0%}]"
        print(f"| {name} | {prefills} | {shown} | {prefill_s:.2f} | {asking_s:.3f} |", flush=True)
        row = {
            "name": name, "method": method, "options": options, "tokens": args.tokens, "documents": args.documents,
            "questions": args.questions, "shards": engine.shards, "prefills_a_document": prefills,
            "right": sum(right), "count": len(right), "wilson95": [low, high], "prefill_s_a_document": prefill_s,
            "query_and_decode_s_a_question": asking_s, "seconds": time.perf_counter() - began, "seed": args.seed,
            "model": "tiny", "dtype": base.model.dtype.name, "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }  # fmt: skip
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())

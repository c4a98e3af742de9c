"""Five texts of about 6K tokens with a fact each, asked as on the README's command line, beside transformers.

    python -m benchmarks.real_questions --methods full,apb [--tokens 6000] [--out DIR]

A text is a stretch of the packaged novel with one sentence put between two of its paragraphs. The prompt is what
``apb_jax.run --model smollm2-135m --document FILE --query TEXT`` makes; transformers' own ``generate`` (PyTorch,
float32, greedy) gets the same ids. Right: the answer holds the fact's words. Needs torch and the model's file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import apb_jax
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.registry import METHODS
from apb_jax.command import Parser, command
from apb_jax.options import parse
from apb_jax.report import versions
from apb_jax.synthetic.packaged import NOVEL
from apb_jax.task import NEW_TOKENS_ABOUT_TEXT, document_task
from benchmarks.real_peer import Peer

MODEL = "smollm2-135m"


class Fact(NamedTuple):
    """A sentence, where it stands in the text (0 to 1), the question, and what a right answer holds."""

    sentence: str
    depth: float
    question: str
    answer: str


FACTS = tuple(
    Fact(
        f"One of the special magic numbers for {key} is: {number}.",
        depth,
        f"What is the special magic number for {key} mentioned in the provided text?",
        number,
    )
    for key, number, depth in (
        ("gull-point", "4912087", 0.5),
        ("quiet-harbor", "4815162", 0.2),
        ("amber-lantern", "8675309", 0.8),
        ("north-ferry", "7203355", 0.95),
        ("glass-museum", "1958264", 0.05),
    )
)
"""In words that a model of 135M parameters understands: it answers freer questions about a page at most."""


def stretch(tokenizer: Any, number: int, tokens: int, fact: Fact) -> str:
    """Text ``number``: paragraphs of the novel from its own place on, with the fact between two of them."""
    paragraphs = NOVEL.read_text(encoding="utf-8").split("\n\n")
    start = number * len(paragraphs) // len(FACTS)
    kept, length = [], 0
    for paragraph in (paragraphs[start:] + paragraphs[:start])[: len(paragraphs)]:
        length += len(tokenizer.encode(paragraph, add_special_tokens=False)) + 1
        if length > tokens:
            break
        kept.append(paragraph)
    at = round(fact.depth * len(kept))
    return "\n\n".join([*kept[:at], fact.sentence, *kept[at:]])


def right(text: str, fact: Fact) -> bool:
    """Whether an answer holds the fact."""
    return fact.answer in text


@command("python benchmarks/real_questions.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--methods", default="full,apb")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS_ABOUT_TEXT)
    parser.add_argument("--texts", type=int, default=len(FACTS), help="only the first ones")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    model = apb_jax.load(MODEL, dtype="float32")
    assert model.folder is not None
    engines = {}
    for name in args.methods.split(","):
        method: type[AttentionMethod] = METHODS[name]
        engines[name] = apb_jax.Engine(model, name, apb_jax.make_mesh(sp=1), shards=method.shards_alone)
    peer = Peer(model.folder)
    totals = dict.fromkeys([*engines, "transformers"], 0)
    for number, fact in enumerate(FACTS[: args.texts]):
        text = stretch(model.tokenizer, number, args.tokens, fact)
        engine = next(iter(engines.values()))
        config = parse(["--model", MODEL, "--document", "-", "--query", fact.question])
        prompt = document_task(config, text, engine).prompt
        row: dict[str, Any] = {"question": fact.question, "tokens": len(prompt.document) + len(prompt.query)}
        for name, engine in engines.items():
            started = time.perf_counter()
            (answer,) = engine.prefill([prompt]).generate(args.new_tokens)
            row[name] = {
                "right": right(answer.text, fact), "answer": answer.text.strip(), "finish": answer.finish_reason,
                "tokens": answer.tokens, "seconds": round(time.perf_counter() - started, 1),
            }  # fmt: skip
        ids = peer.greedy([*prompt.document.tolist(), *prompt.query.tolist()], args.new_tokens, engine.stop_ids)
        theirs = engine.codec.decode(ids) if engine.codec else ""
        row["transformers"] = {"right": right(theirs, fact), "answer": theirs.strip(), "tokens": ids}
        for name in totals:
            totals[name] += row[name]["right"]
            print(f"{name:<12} {'right' if row[name]['right'] else 'wrong'}  {row[name]['answer'][:200]!r}", flush=True)
        if "full" in row:
            row["full_equals_transformers"] = row["full"]["tokens"] == ids
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "real_questions.jsonl").open("a") as file:
                file.write(json.dumps(row | {"model": MODEL, "dtype": "float32", "versions": versions()}) + "\n")
    print(", ".join(f"{name} {count} of {args.texts}" for name, count in totals.items()))


if __name__ == "__main__":
    sys.exit(main())

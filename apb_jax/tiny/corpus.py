"""``python -m apb_jax.tiny.corpus --out FILE``: the corpus that the tiny model's retaining heads are trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from apb_jax.arguments import count, output_file, seed
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import whole_file
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import filler, novel, read_text, split_held_out
from apb_jax.synthetic.sample import text_of
from apb_jax.synthetic.tasks import TASKS, World
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny import FOLDER

SHARES = {
    "single": 0.2, "passkey": 0.1, "multikey": 0.2, "haystack": 0.05, "multivalue": 0.15, "vt": 0.15, "update": 0.15,
}  # fmt: skip
"""Share of records per task."""


def write_corpus(out: Path, data: list[Path], records: int, lengths: list[int], seed: int) -> None:
    """``records`` records {"task", "document", "query", "answer"}, training words, documents of random ``lengths``."""
    if records < 1 or min(lengths, default=0) < 256:
        raise UserError(f"count is {records}, lengths are {lengths}; needed: at least 1 record of 256 tokens")
    haystacks = (filler(), novel(), *(split_held_out(read_text(path))[0] for path in data))
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(FOLDER))
    world = World(
        np.random.default_rng(seed), encoder, vocabulary(held_out=False), haystacks, varied=True, bare_questions=True
    )
    shares = np.asarray(list(SHARES.values())) / sum(SHARES.values())
    with whole_file(out) as part, part.open("w", encoding="utf-8") as file:
        for _ in range(records):
            task = str(world.rng.choice(list(SHARES), p=shares))
            sample = TASKS[task](world, int(world.rng.choice(lengths)) - 1)
            question = sample.questions[0]
            record = {
                "task": task,
                "document": sample.document_text,
                "query": text_of((question.text,)),
                "answer": text_of((question.answer,)),
            }
            file.write(json.dumps(record) + "\n")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.tiny.corpus", description=__doc__)
    parser.add_argument("--out", type=output_file, required=True, help="the .jsonl file")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="real text, as for apb_jax.tiny.train")
    parser.add_argument("--count", type=count(1), default=3000, help="records")
    parser.add_argument("--lengths", type=count(256, 32768), nargs="+", default=[900, 1900, 3900], help="of documents")
    parser.add_argument("--seed", type=seed, default=7, help="of the samples")
    return parser


@command("python -m apb_jax.tiny.corpus")
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    args = make_parser().parse_args(argv)
    write_corpus(args.out, args.data, args.count, args.lengths, args.seed)


if __name__ == "__main__":
    sys.exit(main())

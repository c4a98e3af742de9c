"""``python -m apb_jax.tiny.corpus --out FILE``: the corpus that the tiny model's retaining heads are trained on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from apb_jax.errors import UserError
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


def write_corpus(out: Path, data: list[Path], count: int, lengths: list[int], seed: int) -> None:
    """``count`` records {"task", "document", "query", "answer"}, training words, documents of random ``lengths``."""
    if count < 1 or min(lengths, default=0) < 256:
        raise UserError(f"count is {count} and lengths are {lengths}; needed: at least 1 record of at least 256 tokens")
    haystacks = (filler(), novel(), *(split_held_out(read_text(path))[0] for path in data))
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(FOLDER))
    world = World(
        np.random.default_rng(seed), encoder, vocabulary(held_out=False), haystacks, varied=True, bare_questions=True
    )
    shares = np.asarray(list(SHARES.values())) / sum(SHARES.values())
    with out.open("w", encoding="utf-8") as file:
        for _ in range(count):
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


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0, or 2 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="python -m apb_jax.tiny.corpus", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="real text, as for apb_jax.tiny.train")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[900, 1900, 3900])
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    try:
        write_corpus(args.out, args.data, args.count, args.lengths, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

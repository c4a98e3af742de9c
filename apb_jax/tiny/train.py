"""``python -m apb_jax.tiny.train --out DIR --data FILE... --minutes M``: makes the packaged model from nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from apb_jax import arguments
from apb_jax.arguments import count, number, output_folder
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import write_json
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import Haystack, filler, novel, read_text, split_held_out
from apb_jax.synthetic.sample import text_of
from apb_jax.synthetic.tasks import QUESTION_TASKS, TASKS, World
from apb_jax.synthetic.vocabulary import PEOPLE, vocabulary
from apb_jax.tiny.batches import BatchWorkers
from apb_jax.tiny.rows import Rows
from apb_jax.tiny.tokenizer import save_tokenizer, train_tokenizer

AHEAD = 32
"""Batches asked for ahead of the step that takes them."""

REPLAY = 64
"""Recent batches kept: when the workers are late, one of them is used again instead of letting the device wait."""

EVAL_TOKENS = 131072
EVAL_SEED = 10_000_000


class _LetterTokenizer:
    """Stands in while the texts that the tokenizer is trained on are generated: a token per four letters."""

    def encode(self, piece: str, add_special_tokens: bool = False) -> list[int]:
        return [0] * max(1, len(piece) // 4)


def tokenizer_texts(haystacks: tuple[Haystack, ...]) -> list[str]:
    """What the tokenizer is trained on: all sentences and 100 samples of every task."""
    texts = [sentence for haystack in haystacks for sentence in haystack.sentences]
    texts += [" " + person for person in PEOPLE] * 200  # each a token of its own
    world = World(
        np.random.default_rng(1), Encoder(_LetterTokenizer()), vocabulary(held_out=False), haystacks, varied=True
    )
    for name in QUESTION_TASKS:
        for _ in range(100):
            sample = TASKS[name](world, 1500)
            texts.append(sample.document_text)
            texts += [text_of((q.text, q.answer)) for q in sample.questions]
    return texts


def _evaluate(graph: Any, weights: Any, world: World, lengths: list[int], rows: int) -> dict[str, dict[str, float]]:
    """Exact-match share per task and length, teacher-forced: equal to greedy decoding with full attention."""
    import jax.numpy as jnp

    from apb_jax.tiny.fit import predictions
    from apb_jax.tiny.rows import lay_out

    table: dict[str, dict[str, float]] = {}
    for length in lengths:
        batch = max(1, min(rows, EVAL_TOKENS // length))
        for task in QUESTION_TASKS:
            correct = done = 0
            while done < rows:
                tokens = np.full((batch, length), 2, np.int32)
                spans = []
                for r in range(batch):
                    sample = TASKS[task](world, length - 200)
                    question = sample.questions[int(world.rng.integers(len(sample.questions)))]
                    one = type(sample)(sample.task, sample.document, (question,))
                    ids, _ = lay_out(one, world.encoder, embed=bool(r % 2))
                    answer = sum(len(world.encoder(p.text)) for p in question.answer) + 1
                    tokens[r, : len(ids)] = ids[:length]
                    spans.append((len(ids) - answer, len(ids)))
                positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
                guess = np.asarray(predictions(graph, weights, jnp.asarray(tokens), jnp.asarray(positions)))
                correct += sum(
                    bool((guess[r, a - 1 : b - 1] == tokens[r, a:b]).all()) for r, (a, b) in enumerate(spans)
                )
                done += batch
            table.setdefault(task, {})[str(length)] = correct / done
    return table


def _train(args: argparse.Namespace, console: Console) -> None:
    texts = [read_text(path) for path in args.data]
    train_parts, held_parts = zip(*(split_held_out(text) for text in texts), strict=True) if texts else ((), ())
    haystacks = (filler(), novel(), *train_parts)
    began = time.perf_counter()
    if args.start_from:
        missing = [name for name in ("model.safetensors", "tokenizer.json") if not (args.start_from / name).is_file()]
        if missing:
            raise UserError(f"--start-from {args.start_from} holds no {missing[0]}; give a folder of this command")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start_from)
    else:
        tokenizer = train_tokenizer(tokenizer_texts(haystacks))
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    encoder = Encoder(tokenizer)
    for haystack in haystacks:
        for sentence in haystack.sentences:
            encoder(sentence)
    words = vocabulary(held_out=False)
    for word in (*(" " + w for w in words.adjectives), *words.nouns, *(" " + w for w in words.variables)):
        encoder(word)
    console.print(f"tokenizer of {len(tokenizer)} tokens in {time.perf_counter() - began:.1f} s")

    lengths = tuple(args.lengths) if args.lengths else None
    with BatchWorkers(encoder, haystacks, workers=args.workers, seed=args.seed, max_positions=32768) as workers:
        # JAX is first used here: the workers are forked, and forking a process with an open device is not safe.
        import jax
        import jax.numpy as jnp

        from apb_jax.tiny.fit import (
            CONFIG,
            from_hf_tensors,
            initial,
            learning_rate,
            optimizer,
            row_length,
            rows_of,
            save_checkpoint,
            train_step,
        )  # fmt: skip

        graph, weights, moments = initial(args.seed)
        if args.start_from:
            graph, weights = from_hf_tensors(load_file(args.start_from / "model.safetensors"), CONFIG)
            moments = optimizer().init(weights)
        rng = np.random.default_rng(args.seed)
        device = jax.devices()[0]
        console.print(f"JAX {jax.__version__} on {device.device_kind}, {CONFIG.parameters:,} parameters")
        begin = last_saved = time.perf_counter()
        tokens_seen = step = 0
        log: list[dict[str, float]] = []
        recent: list[jax.Array] = []
        waiting: list[jax.Array] = []
        pool: deque[Rows] = deque(maxlen=REPLAY)
        replayed = 0
        progress = 0.0
        while progress < 1.0:
            while workers.pending < AHEAD:
                length = row_length(rng, progress, lengths)
                workers.request(rows_of(length, args.batch_scale), length)
            batch = workers.take(wait=args.steps is not None or len(pool) < REPLAY)
            if batch is None:
                batch = pool[int(rng.integers(len(pool)))]
                replayed += 1
            else:
                pool.append(batch)
            weights, moments, loss = train_step(
                graph, weights, moments, jnp.asarray(batch.tokens), jnp.asarray(batch.positions),
                jnp.asarray(batch.weights), jnp.float32(learning_rate(step, progress)),
            )  # fmt: skip
            recent.append(loss)
            tokens_seen += batch.weights.size
            step += 1
            if len(recent) == 10 or args.steps:
                # The ten before these: waiting for them keeps the clock true and leaves the device work to do.
                waiting, recent, done = recent, [], waiting
                mean = float(np.mean([float(x) for x in done or waiting]))
                elapsed = time.perf_counter() - begin
                progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
                if not np.isfinite(mean):
                    raise UserError(f"the loss is {mean} at step {step}: training diverged; try another --seed")
                if step % 200 == 0 or args.steps:
                    log.append({"step": step, "seconds": elapsed, "tokens": tokens_seen, "loss": mean})
                    left = (1 - progress) * elapsed / max(progress, 1e-9)
                    rate = tokens_seen / elapsed / 1e6
                    console.print(
                        f"step {step:6d}  {progress:4.0%}  loss {mean:.4f}  {rate:.2f}M tok/s  "
                        f"replayed {replayed / step:.0%}  ETA {left:.0f} s",
                        highlight=False,
                    )
                if time.perf_counter() - last_saved > 60:
                    save_checkpoint(args.out, graph, weights)
                    last_saved = time.perf_counter()
        save_checkpoint(args.out, graph, weights)
    summary = {
        "device": device.device_kind, "jax": jax.__version__, "seconds": time.perf_counter() - begin, "steps": step,
        "tokens": tokens_seen, "replayed_share": replayed / step, "seed": args.seed, "loss": log,
    }  # fmt: skip
    if args.evaluate:
        world = World(
            np.random.default_rng(EVAL_SEED + args.seed),
            encoder,
            vocabulary(held_out=True),
            (filler(), novel(), *held_parts),
        )
        summary["exact_match"] = _evaluate(graph, weights, world, args.evaluate, args.eval_rows)
        for task, row in summary["exact_match"].items():
            console.print(f"{task:12s}" + "".join(f"  {n}: {100 * v:5.1f}" for n, v in row.items()), highlight=False)
    write_json(args.out / "training.json", summary)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.tiny.train", description=__doc__)
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--data", type=Path, nargs="*", default=[], help="real text: .txt, or .json with a text field or SQuAD's layout"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=number(float, 0, 1e6, above=True), help="training time")
    budget.add_argument("--steps", type=count(1), help="training steps")
    parser.add_argument("--start-from", type=Path, help="go on from this checkpoint folder (its tokenizer is kept)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of weights and samples")
    parser.add_argument("--workers", type=count(1, 256), default=2, help="processes that make batches")
    parser.add_argument("--lengths", type=count(256, 32768), nargs="*", help="only these row lengths")
    parser.add_argument(
        "--batch-scale", type=number(float, 0, 1024, above=True), default=1.0, help="tokens of a step, times this"
    )
    parser.add_argument(
        "--evaluate",
        type=count(512, 32768),
        nargs="*",
        help="afterwards: exact match with full attention at these lengths",
    )
    parser.add_argument("--eval-rows", type=count(1), default=64, help="samples per task and length")
    return parser


@command("python -m apb_jax.tiny.train")
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    _train(make_parser().parse_args(argv), Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())

"""``python -m apb_jax.retaining.train --model DIR --data FILE --out heads.safetensors``: trains retaining heads.

The model stays frozen; one pass per step gives scores and labels. Recipe of Locret (arXiv 2410.01805) with APB's
changes (2502.12085, appendix B.1): AdamW 5e-4 (0.9, 0.95), linear schedule with 300 warm-up steps, gradient values
clipped at 0.5, 3000 steps of one sample each. Checkpoints go beside the output; a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.numpy import save_file

from apb_jax import arguments
from apb_jax.arguments import count, number, one_of, output_file
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import read_json, whole_file, write_json
from apb_jax.model.config import ModelConfig
from apb_jax.model.heads import RetainingHead
from apb_jax.prompt.codec import PromptCodec
from apb_jax.prompt.codec import make_codec as codec_of
from apb_jax.retaining.corpus import Corpus, Example, read_data_set, read_records
from apb_jax.retaining.labels import Sample, trace
from apb_jax.retaining.objective import layer_scores, retaining_loss, top_overlap
from apb_jax.typed import check_types
from apb_jax.weights.checkpoint import LoadedModel, load

MAX_PROMPT, MAX_ANSWER = 10240, 1024
"""Tokens of a prompt and of an answer where neither the user nor the model's positions say less."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one run; a checkpoint of another recipe is not resumed."""

    hidden: int = 1024
    steps: int = 3000
    warmup: int = 300
    learning_rate: float = 5e-4
    smoothing: float = 0.0025
    clip: float = 0.5
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("hidden", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise UserError(f"warmup is {self.warmup}; it must be at least 0 and below the {self.steps} steps")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning rate is {self.learning_rate}; it must be above 0 (the papers: 5e-4)")
        for name in ("smoothing", "clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0, and finite")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under the schedule, on gradients clipped element by element."""
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1)),
                optax.linear_schedule(self.learning_rate, 0.0, self.steps - self.warmup),
            ],
            [self.warmup],
        )
        return optax.chain(
            optax.clip(self.clip), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=self.weight_decay)
        )


def initial_heads(config: ModelConfig, hidden: int, seed: int) -> RetainingHead:
    """Random heads of all layers, float32, uniform within 1/sqrt(fan-in) (torch's default for such layers)."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    keys = jax.random.split(jax.random.key(seed), 2)
    n, width = config.num_layers, config.retaining_width
    fc1 = jax.random.uniform(keys[0], (n, width, hidden), jnp.float32, -1.0, 1.0) * width**-0.5
    fc2 = jax.random.uniform(keys[1], (n, hidden, config.num_kv_heads), jnp.float32, -1.0, 1.0) * hidden**-0.5
    return RetainingHead(fc1[:, :q], fc1[:, q : q + kv], fc1[:, q + kv :], fc2)


def padded(n: int, smallest: int) -> int:
    """The next size of which programs are compiled: ``smallest`` times 1, 1.5, 2, 3, 4, 6, ..."""
    size = smallest
    while size < n:
        if size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


@partial(jax.jit, static_argnames=("graph", "recipe"), donate_argnums=(2, 3))
def train_step(
    graph: nnx.GraphDef,
    weights: nnx.State,
    heads: RetainingHead,
    moments: optax.OptState,
    sample: Sample,
    *,
    recipe: Recipe,
) -> tuple[RetainingHead, optax.OptState, Float[Array, ""], Float[Array, "L K"]]:
    """(heads, optimizer state, loss, top-10% overlap per head) after one sample."""
    traces = trace(graph, weights, sample)

    def loss_of(heads: RetainingHead) -> tuple[Float[Array, ""], Float[Array, "L K T"]]:
        cast = jax.tree.map(lambda w: w.astype(traces.q.dtype), heads)
        scores = layer_scores(cast, traces.q, traces.k, traces.v)
        return retaining_loss(scores, traces.labels, sample.prompt_tokens, recipe.smoothing), scores

    (loss, scores), gradient = jax.value_and_grad(loss_of, has_aux=True)(heads)
    updates, moments = recipe.optimizer().update(gradient, moments, heads)
    return optax.apply_updates(heads, updates), moments, loss, top_overlap(scores, traces.labels, sample.prompt_tokens)


def hf_heads(heads: RetainingHead) -> dict[str, np.ndarray]:
    """bfloat16 tensors under the original names: fc1.weight [F, (H+2K)*D], fc2.weight [K, F]."""
    fc1 = jnp.concatenate([heads.fc1_q, heads.fc1_k, heads.fc1_v], axis=1).astype(jnp.bfloat16)
    fc2 = heads.fc2.astype(jnp.bfloat16)
    out = {}
    for i in range(fc1.shape[0]):
        out[f"model.layers.{i}.self_attn.fc1.weight"] = np.ascontiguousarray(np.asarray(fc1[i].T))
        out[f"model.layers.{i}.self_attn.fc2.weight"] = np.ascontiguousarray(np.asarray(fc2[i].T))
    return out


class Checkpoints:
    """Training state on disk after every ``every`` steps, whole or not at all, refused if it is of another run."""

    def __init__(self, folder: Path, run: dict[str, Any], every: int) -> None:
        self.folder, self.every = folder.absolute(), every
        self._card, self._log = self.folder / "run.json", self.folder / "log.json"
        if self._card.exists():
            found = read_json(self._card, "the checkpoints' card")
            if not isinstance(found, dict):
                raise UserError(f"{self._card} is damaged; give --restart or another --out")
            other = sorted(k for k in run if k != "steps" and found.get(k) != run[k])
            if other:
                raise UserError(
                    f"{folder} holds checkpoints of another run ({', '.join(other)} differ); "
                    "give --restart or another --out"
                )
        self._manager = ocp.CheckpointManager(
            self.folder / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        )
        latest = self.latest()
        if latest is not None and latest > run["steps"]:
            self.close()
            raise UserError(
                f"{folder} holds a run of {latest} steps, more than --steps {run['steps']}; give --steps {latest} or "
                "more to go on, or --restart"
            )
        write_json(self._card, run)

    def latest(self) -> int | None:
        """The last step saved."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, in the shapes and types of ``like``."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def log(self, step: int) -> list[dict[str, float]]:
        """The log up to a step, as it was saved with the checkpoints."""
        rows = read_json(self._log, "the checkpoints' log") if self._log.exists() else []
        return [row for row in rows if row["step"] <= step]

    def save(self, step: int, state: Any, log: list[dict[str, float]]) -> None:
        """Save and wait until it is on disk."""
        write_json(self._log, log)
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def close(self) -> None:
        """End the manager's threads."""
        self._manager.close()


def order(count: int, seed: int, first: int, last: int) -> Iterator[int]:
    """Samples of steps ``first`` to ``last`` - 1: a fresh permutation per epoch, given by seed and step alone."""
    for step in range(first, last):
        epoch, place = divmod(step, count)
        if place == 0 or step == first:
            permutation = np.random.default_rng([seed, epoch]).permutation(count)
        yield int(permutation[place])


class Examples(Protocol):
    """What heads are trained on: pieces, and the tokens of each."""

    def pieces(self) -> Sequence[Any]: ...

    def example(self, record: Any, index: int) -> Example: ...


def train(
    model: LoadedModel,
    corpus: Examples,
    recipe: Recipe,
    checkpoints: Checkpoints | None,
    console: Console,
) -> tuple[RetainingHead, list[dict[str, float]]]:
    """Heads after all steps, and a log of (step, loss, overlap) every 50 steps."""
    graph, weights = model.graph(), model.place(None)
    heads = initial_heads(model.config, recipe.hidden, recipe.seed)
    moments = recipe.optimizer().init(heads)
    first = 0
    log: list[dict[str, float]] = []
    latest = checkpoints.latest() if checkpoints else None
    if checkpoints and latest is not None:
        state = checkpoints.restore(latest, {"heads": asdict(heads), "moments": moments})
        heads, moments, first = RetainingHead(**state["heads"]), state["moments"], latest
        log = checkpoints.log(first)
        console.print(f"going on from step {first} of {recipe.steps}")
    pieces = corpus.pieces()
    columns = (
        TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=recipe.steps, completed=first, what="")
        recent: list[tuple[jax.Array, jax.Array]] = []
        for step, index in enumerate(order(len(pieces), recipe.seed, first, recipe.steps), first + 1):
            example: Example = corpus.example(pieces[index], index)
            prompt, total = len(example.prompt), len(example.prompt) + len(example.answer)
            prompt_rows, answer_rows = padded(prompt, 256), padded(len(example.answer), 128)
            tokens = np.zeros((1, prompt_rows + answer_rows), np.int32)
            tokens[0, :total] = np.concatenate([example.prompt, example.answer])
            sample = Sample(jnp.asarray(tokens), jnp.int32(prompt), jnp.int32(total), prompt_rows, answer_rows)
            heads, moments, loss, overlap = train_step(graph, weights, heads, moments, sample, recipe=recipe)
            recent.append((loss, overlap))
            progress.update(bar, completed=step)
            if step % 10 == 0 or step == recipe.steps:
                mean = float(np.mean([float(x) for x, _ in recent]))
                share = float(np.mean([np.mean(np.asarray(y)) for _, y in recent]))
                recent = []
                if not np.isfinite(mean):
                    raise UserError(f"the loss is {mean} at step {step}; try a smaller --learning-rate")
                progress.update(bar, what=f"loss {mean:.4f}  top-10% overlap {share:.1%}")
                if step % 50 == 0 or step == recipe.steps:
                    log.append({"step": step, "loss": mean, "overlap": share})
            if checkpoints and (step % checkpoints.every == 0 or step == recipe.steps):
                checkpoints.save(step, {"heads": asdict(heads), "moments": moments}, log)
    return heads, log


def lengths_within(model: LoadedModel, prompt: int | None, answer: int | None) -> tuple[int, int]:
    """Tokens of a prompt and of an answer, as asked or up to what the model has positions for.

    Raises:
        UserError: what was asked for exceeds the positions.
    """
    positions = model.config.max_positions
    # What is left open shrinks with the model: an answer to a quarter of the positions, a prompt to the rest.
    fits = answer if answer is not None else min(MAX_ANSWER, positions // 4)
    chosen = prompt if prompt is not None else min(MAX_PROMPT, positions - fits)
    if answer is None and prompt is not None:
        fits = min(fits, positions - prompt)
    if chosen + fits > positions or chosen < 1 or fits < 1:
        raise UserError(
            f"prompts of {chosen} and answers of {fits} tokens exceed the {positions} positions of {model.name}; "
            f"nearest legal choice: --max-length {max(1, positions - max(1, min(fits, positions // 4)))} "
            f"--max-answer {max(1, min(fits, positions // 4))}"
        )
    return chosen, fits


def make_codec(model: LoadedModel) -> PromptCodec:
    """The model's tokenizer under its chat template."""
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer; retaining heads are trained on text")
    return codec_of(model.tokenizer, model.name)


def run(args: argparse.Namespace, console: Console) -> None:
    """The command behind ``main``."""
    if not args.data and not args.dataset:
        raise UserError("no corpus: give --data FILE... or --dataset NAME")
    recipe = Recipe(args.hidden, args.steps, args.warmup, args.learning_rate, args.smoothing, seed=args.seed)
    records = [r for path in args.data for r in read_records(path)]
    if args.dataset:
        records += read_data_set(args.dataset, args.split)
    model = load(str(args.model), dtype=args.dtype)
    max_length, max_answer = lengths_within(model, args.max_length, args.max_answer)
    corpus = Corpus(tuple(records), make_codec(model), max_length, max_answer, args.embed_share)
    digest = hashlib.sha256(repr(records).encode()).hexdigest()[:16]
    card = asdict(recipe) | {
        "model": model.name, "corpus": digest, "records": len(records), "max_length": max_length,
        "max_answer": max_answer, "embed_share": args.embed_share,
    }  # fmt: skip
    folder = args.out.with_name(args.out.name + ".checkpoints")
    if args.restart and folder.exists():
        shutil.rmtree(folder)
    checkpoints = Checkpoints(folder, card, args.save_every)
    device = jax.devices()[0].device_kind
    console.print(f"{len(records)} records, {recipe.steps} steps on {device}, JAX {jax.__version__}")
    finished = checkpoints.latest() == recipe.steps and args.out.exists()
    try:
        log = checkpoints.log(recipe.steps)
        if not finished:
            heads, log = train(model, corpus, recipe, checkpoints, console)
    finally:
        checkpoints.close()
    if args.log:
        write_json(args.log, {"run": card, "log": log})
    if finished:
        console.print(f"these {recipe.steps} steps are done; {args.out} stays as it is (--restart, or more --steps)")
        return
    metadata = {"format": "pt", "recipe": json.dumps(card), "device": device, "jax": jax.__version__}
    metadata |= {"final": json.dumps(log[-1])} if log else {}
    tensors = hf_heads(heads)
    if not all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values()):
        raise UserError("the trained heads hold values that are not finite; try a smaller --learning-rate")
    with whole_file(args.out) as part:
        save_file(tensors, part, metadata=metadata)
    if log:
        console.print(f"loss {log[-1]['loss']:.4f}, top-10% overlap {log[-1]['overlap']:.1%}: {args.out}")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.retaining.train", description=__doc__)
    parser.add_argument("--model", required=True, help="preset, HF folder or HF id")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text, .json or .jsonl files")
    parser.add_argument("--dataset", help="a data set for datasets.load_dataset")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--out", type=output_file, required=True, help="safetensors file of the heads")
    parser.add_argument("--hidden", type=count(1, 65536), default=1024, help="width F of the heads")
    parser.add_argument("--steps", type=count(1), default=3000, help="samples to train on, one a step")
    parser.add_argument("--warmup", type=count(0), default=300, help="warm-up steps (APB: 300, Locret: 2000)")
    parser.add_argument("--learning-rate", type=number(float, 0, 1, above=True), default=5e-4, help="its highest")
    parser.add_argument("--smoothing", type=number(float, 0), default=0.0025, help="weight of the scores' smoothness")
    parser.add_argument(
        "--max-length",
        type=count(16),
        help=f"tokens of a prompt at most (default: {MAX_PROMPT}, or as many as the model holds)",
    )
    parser.add_argument(
        "--max-answer",
        type=count(1),
        help=f"tokens of an answer, question included (default: {MAX_ANSWER}, or a quarter of the positions)",
    )
    parser.add_argument(
        "--embed-share",
        type=number(float, 0, 1),
        default=1.0,
        help="share of questions that also stand in front, as in APB's anchor",
    )
    parser.add_argument(
        "--dtype",
        type=one_of(("bf16", "float32")),
        help="of the frozen model (default: bf16 on a GPU, float32 elsewhere)",
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the heads and the order of samples")
    parser.add_argument("--save-every", type=count(1), default=50, help="steps between checkpoints")
    parser.add_argument("--restart", action="store_true", help="throw away checkpoints of an earlier run")
    parser.add_argument("--log", type=output_file, help="JSON file for loss and overlap over the steps")
    return parser


@command("python -m apb_jax.retaining.train", resumes="; the same command goes on from its last checkpoint")
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    run(make_parser().parse_args(argv), Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())

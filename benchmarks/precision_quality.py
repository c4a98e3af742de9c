"""What 8-bit floats cost in answers: RULER, SQuAD and perplexity under bf16 and then one field of precision more a row.

    python -m benchmarks.precision_quality --model tiny --seq 8k,16k --samples 100 --out DIR
    python -m benchmarks.precision_quality --model smollm2-135m --seq 8k --data DIR --samples 100 --out DIR
    python -m benchmarks.precision_quality --part layers,perplexity --model smollm2-135m --out DIR

The first row is the model's own dtype; the next ones add each choice of weights, KV and attention that there is, on top
of the fp8 ones before it. The same samples everywhere; scores with n and their Wilson interval. ``layers``: the error
that 8-bit weights add in each layer, fed with the wide model's own rows (``layers.png`` beside the rows). Runs on a CPU
(emulated, the same arithmetic) or on a GPU. One JSON line a cell goes to ``DIR/precision_quality.jsonl``; cells that
are there are not run again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import apb_jax
from apb_jax.arguments import lengths, names
from apb_jax.attention.inputs import LayerInputs
from apb_jax.command import Parser, command
from apb_jax.compile_cache import use_compile_cache
from apb_jax.errors import UserError
from apb_jax.mesh import has_accelerator, reserve_memory, simulate_devices
from apb_jax.precision import CHOICES, FP8, MODEL, Precision
from apb_jax.report import versions
from apb_jax.synthetic.grading import wilson
from apb_jax.synthetic.packaged import NOVEL
from apb_jax.weights.checkpoint import LoadedModel
from evals.base import EvalError, SystemSpec
from evals.ruler import TASKS, RulerTask, needed_text
from evals.system import connect

PARTS = ("ruler", "perplexity", "layers")
LAYER_ROWS = 512


def recipes() -> Iterator[Precision]:
    """Everything in the model's dtype, then field by field each of its choices on the fp8 ones of the fields before."""
    yield Precision()
    so_far: dict[str, str] = {}
    for field, known in CHOICES.items():
        for choice in known:
            if choice != MODEL:
                yield Precision(**(so_far | {field: choice}))
        if FP8 in known:
            so_far[field] = FP8


class Rows:
    """Cells as JSON lines; those of an earlier run are kept."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.until = folder / "precision_quality.jsonl", time.perf_counter() + limit_s
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {tuple(json.loads(line)["cell"]) for line in lines}
        device = jax.devices()[0]
        self.always = {"device": device.device_kind, "date": date.today().isoformat(), "versions": versions()}

    def add(self, cell: tuple[Any, ...], words: str, **row: Any) -> None:
        """Keep and print one."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cell, **self.always, **row}) + "\n")
        print(words, flush=True)

    def wanted(self, cell: tuple[Any, ...]) -> bool:
        """Whether it has to be run, and there is time."""
        if cell in self.done:
            return False
        if time.perf_counter() > self.until:
            print(f"left out, the limit is reached: {cell}", flush=True)
            return False
        return True


def systems(args: Any, precision: Precision) -> Callable[[str], Any]:
    """Method -> system at ``precision``."""
    spec = SystemSpec(
        args.model, args.method, {}, None, None, args.dtype, 1, 1, args.shards, max(args.seq), precision=precision
    )
    return connect(spec)


def ruler(rows: Rows, args: Any) -> None:
    """Scores of every task, length, method and recipe on the same samples."""
    tasks = args.tasks or tuple(task for task in TASKS if args.data or needed_text(task) is None)
    for precision in recipes():
        place: Callable[[str], Any] | None = None
        for method in args.method:
            for length in args.seq:
                for name in tasks:
                    cell = ("ruler", args.model, method, length, name, precision.word, args.samples)
                    if not rows.wanted(cell):
                        continue
                    place = place or systems(args, precision)
                    system = place(method)
                    try:
                        task = RulerTask(name, system.tokens, length, args.samples, variant="ruler_fit", data=args.data)
                        scores = [
                            task.score(one, system.generate(one.document, one.query, one.max_new_tokens).text)
                            for one in task.examples()
                        ]
                    except (EvalError, UserError) as error:
                        print(f"{cell}: {error}", flush=True)
                        continue
                    total = float(np.sum(scores))
                    low, high = wilson(total, len(scores))
                    rows.add(
                        cell,
                        f"{method:<6} {length:>6} {name:<16} {precision.word:<12} {total / len(scores):6.1%} of "
                        f"{len(scores)}, 95% {low:.1%} to {high:.1%}",
                        score=total / len(scores), n=len(scores), wilson95=[low, high], scores=scores,
                        dtype=system.describe()["dtype"],
                    )  # fmt: skip


def perplexity(rows: Rows, args: Any) -> None:
    """exp of the mean NLL of the last ``--window`` tokens of the packaged novel at each length."""
    for precision in recipes():
        place: Callable[[str], Any] | None = None
        for method in args.method:
            for length in args.seq:
                cell = ("perplexity", args.model, method, length, "novel", precision.word, args.window)
                if not rows.wanted(cell):
                    continue
                place = place or systems(args, precision)
                system = place(method)
                ids = list(system.tokens.encode(NOVEL.read_text(encoding="utf-8")))[: length - 1]
                start = len(ids) - args.window
                scored = system.log_probs(ids[:start], ids[start:])
                nll = -np.asarray(scored.log_probs, np.float64)
                rows.add(
                    cell,
                    f"{method:<6} {length:>6} perplexity       {precision.word:<12} {math.exp(nll.mean()):8.3f} over "
                    f"{len(nll)} tokens (standard error of the mean NLL {nll.std() / len(nll) ** 0.5:.4f})",
                    perplexity=math.exp(nll.mean()), n=len(nll), nll=nll.tolist(), dtype=system.describe()["dtype"],
                )  # fmt: skip


def causal(inputs: LayerInputs, carry: Any) -> tuple[jax.Array, Any]:
    """Dense causal attention of one document without a cache, in float32."""
    q, k = (x.astype(jnp.float32) for x in inputs.rotated())
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k, inputs.v))
    logits = jnp.einsum("bshd,bthd->bhst", q, k, precision="highest") * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, v, precision="highest").astype(inputs.q.dtype), carry


def layer_errors(model: LoadedModel) -> list[tuple[float, float]]:
    """For each layer (error of what it adds, error of its output), relative, on the novel's first rows."""
    mesh = apb_jax.make_mesh(1)
    wide, narrow = (apb_jax.Engine(model, "full", mesh, precision=Precision(weights=one)) for one in (MODEL, FP8))
    assert model.tokenizer is not None
    text = NOVEL.read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)[:LAYER_ROWS]
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]

    def one(engine: apb_jax.Engine) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
        graph = engine.model.graph()

        def run(state: Any, x: jax.Array, layer: jax.Array) -> jax.Array:
            return nnx.merge(graph, state).run_layers(x, positions, causal, (), start=layer, count=1)[0]

        return jax.jit(run)

    steps = {"wide": one(wide), "fp8": one(narrow)}
    x = nnx.merge(model.graph(), wide.state).embed(jnp.asarray([ids]))
    found = []
    for layer in range(model.config.num_layers):
        exact = steps["wide"](wide.state, x, jnp.int32(layer))
        rounded = steps["fp8"](narrow.state, x, jnp.int32(layer))
        gap = float(jnp.linalg.norm((rounded - exact).astype(jnp.float32)))
        added, size = (float(jnp.linalg.norm(a.astype(jnp.float32))) for a in (exact - x, exact))
        found.append((gap / added, gap / size))
        x = exact
    return found


def layers(rows: Rows, args: Any) -> None:
    """The error of 8-bit weights by layer, as rows and as a plot."""
    cell = ("layers", args.model)
    if not rows.wanted(cell):
        return
    model = apb_jax.load(args.model, dtype=args.dtype)
    found = layer_errors(model)
    for number, (added, size) in enumerate(found):
        print(f"layer {number:>2}: {added:.2%} of what it adds, {size:.2%} of the rows behind it", flush=True)
    worst = int(np.argmax([added for added, _ in found]))
    rows.add(cell, f"the largest in layer {worst}", errors=found, rows=LAYER_ROWS, dtype=model.dtype.name)
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    axis.plot([100 * added for added, _ in found], marker="o", label="of what the layer adds")
    axis.plot([100 * size for _, size in found], marker="s", label="of the rows behind it")
    axis.set(xlabel="layer", ylabel="relative error, %", title=f"{args.model}: 8-bit weights and rows", ylim=(0, None))
    axis.legend()
    figure.savefig(rows.file.with_name("layers.png"), dpi=120, bbox_inches="tight")


@command("python -m benchmarks.precision_quality", resumes="; the same command goes on with the next cell")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--part", type=names, default=("layers", "perplexity", "ruler"), help=", ".join(PARTS))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--method", type=names, default=("full", "apb"))
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seq", type=lengths, default=(8192,))
    parser.add_argument("--tasks", type=names, help="of RULER (default: all that the data at hand allow)")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--data", help="folder with squad_dev_v2_part.json or RULER's own files: adds qa_1 and others")
    parser.add_argument("--dtype", choices=("bf16", "float32"))
    parser.add_argument("--limit-s", type=float, default=1e9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if has_accelerator():
        reserve_memory()
    else:
        simulate_devices(1)
    use_compile_cache()
    rows = Rows(args.out, args.limit_s)
    run = {"ruler": ruler, "perplexity": perplexity, "layers": layers}
    for part in args.part:
        run[part](rows, args)


if __name__ == "__main__":
    sys.exit(main())

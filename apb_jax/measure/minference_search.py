"""``python -m apb_jax.measure.minference_search``: choose each head's pattern offline, as MInference's release does.

    python -m apb_jax.measure.minference_search --model tiny --seq 4k --out patterns.json

One sample, one dense pass; per head the candidate whose mask keeps the most attention wins. The file has the original
format, and ``--method minference`` reads it. As in the release, a winning stream_llm is written as vertical_and_slash
(100, 800) and a winning block_sparse as vertical_and_slash (1000, 6096).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from apb_jax import arguments
from apb_jax.arguments import count, length, output_file
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.files import read_text, write_json

Candidates = tuple[tuple[str, int, int], ...]
CANDIDATES: Candidates = (
    ("stream_llm", 100, 800),
    ("vertical_and_slash", 30, 800),
    ("vertical_and_slash", 100, 750),
    ("vertical_and_slash", 500, 700),
    ("vertical_and_slash", 3500, 100),
    ("block_sparse", 8, 0),
)
"""(type, vertical, slash) in the release's order; block_sparse keeps one in ``vertical`` blocks of BLOCK rows."""
WRITTEN = {"stream_llm": ("vertical_and_slash", 100, 800), "block_sparse": ("vertical_and_slash", 1000, 6096)}
LAST_ROWS, FORCED, BLOCK = 64, 30, 32
SKIP_ROWS = 2500


@dataclass(frozen=True)
class Choice:
    """A head's winning candidate and the share of attention that it keeps."""

    kind: str
    vertical: int
    slash: int
    recall: float

    def row(self) -> list[Any]:
        """An entry of the pattern file."""
        return [*WRITTEN.get(self.kind, (self.kind, self.vertical, self.slash)), self.recall]


def candidate_mask(
    p: Float[Array, "n n"], scores: Float[Array, "m m"], candidate: tuple[str, int, int]
) -> Bool[Array, "n n"]:
    """The causal keys that a candidate keeps. ``p``: a head's probabilities; ``scores``: products of block means."""
    kind, vertical, slash = candidate
    n = p.shape[0]
    key = jnp.arange(n, dtype=jnp.int32)
    distance = key[:, None] - key[None]
    if kind == "stream_llm":
        kept = (key[None] < vertical) | (distance <= slash)
    elif kind == "vertical_and_slash":
        last = p[n - min(LAST_ROWS, n) :]
        columns = jnp.where(key < FORCED, jnp.inf, last.sum(axis=0))
        rows = jnp.arange(n - last.shape[0], n, dtype=jnp.int32)
        source = rows[:, None] - key
        on_line = jnp.where(source >= 0, jnp.take_along_axis(last, jnp.maximum(source, 0), axis=1), 0.0).sum(axis=0)
        lines = jnp.where(key < FORCED, jnp.inf, on_line)  # key counts distances here

        def members(values: Array, count: int) -> Array:
            return jnp.zeros((n,), bool).at[jax.lax.top_k(values, min(count, n))[1]].set(True)

        kept = members(columns, vertical)[None] | members(lines, slash)[jnp.maximum(distance, 0)]
    else:
        blocks = scores.shape[0]
        own = jnp.arange(blocks, dtype=jnp.int32)
        causal = jnp.where(own[None] <= own[:, None], scores, -jnp.inf)
        chosen = jax.lax.top_k(causal, max(1, blocks // vertical))[1]
        grid = jnp.zeros((blocks, blocks), bool).at[own[:, None], chosen].set(True)
        kept = jnp.repeat(jnp.repeat(grid, BLOCK, axis=0), BLOCK, axis=1)[:n, :n]
    return kept & (distance >= 0)


def search_head(
    q: Float[Array, "n D"], k: Float[Array, "n D"], skip_rows: int = SKIP_ROWS, candidates: Candidates = CANDIDATES
) -> Float[Array, " candidates"]:
    """Recall of every candidate for one head: probability kept, mean over the rows from ``skip_rows`` on."""
    n, dim = q.shape
    key = jnp.arange(n, dtype=jnp.int32)
    logits = jnp.matmul(q, k.T, precision="highest") * jnp.float32(dim**-0.5)
    p = jax.nn.softmax(jnp.where(key[None] <= key[:, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    padding = -n % BLOCK
    means = [jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, BLOCK, dim).mean(axis=1) for x in (q, k)]
    scores = jnp.matmul(means[0], means[1].T, precision="highest")
    recalls = [jnp.where(candidate_mask(p, scores, c), p, 0.0).sum(axis=-1)[skip_rows:].mean() for c in candidates]
    return jnp.stack(recalls)


def choose(recalls: np.ndarray, candidates: Candidates = CANDIDATES) -> Choice:
    """The first candidate that no later one beats."""
    best = int(np.argmax(recalls))  # the first of equals: a later candidate must be strictly better
    return Choice(*candidates[best], float(recalls[best]))


def search(engine: Any, document: Any, query: Any, skip_rows: int) -> list[dict[str, list[Any]]]:
    """Patterns of every layer and head of an engine's model on one prompt (dense attention, one device)."""
    from jax.sharding import PartitionSpec as P

    from apb_jax.attention.inputs import LayerInputs
    from pallas_kernels.flash_attention import RowSegment, flash_attention

    config, programs = engine.model.config, engine.programs
    ids = np.concatenate([np.asarray(document, np.int32), np.asarray(query, np.int32)])[None]
    n, group = ids.shape[1], config.group_size

    def body(state: Any, tokens: Array) -> Array:
        model = programs.model(state)

        def attend(x: LayerInputs, found: Array) -> tuple[Array, Array]:
            q, k = x.rotated()
            heads = jnp.arange(config.num_heads, dtype=jnp.int32)
            wide = (a[0].astype(jnp.float32) for a in (q, k))
            q32, k32 = wide
            recalls = jax.lax.map(lambda h: search_head(q32[:, h], k32[:, h // group], skip_rows), heads)
            out, _ = flash_attention(q, (k,), (x.v,), (RowSegment(n, start=0, offset=0, end=n),))
            return out, jax.lax.dynamic_update_index_in_dim(found, recalls, x.layer, 0)

        empty = jnp.zeros((config.num_layers, config.num_heads, len(CANDIDATES)), jnp.float32)
        positions = jnp.arange(n, dtype=jnp.int32)[None]
        return model.run_layers(model.embed(tokens), positions, attend, empty, start=jnp.int32(0))[1]

    recalls = np.asarray(programs.traced(body, (programs.specs, P()), P())(engine.state, jnp.asarray(ids)))
    return [{str(h): choose(row).row() for h, row in enumerate(layer)} for layer in recalls]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m apb_jax.measure.minference_search", description=__doc__)
    parser.add_argument("--model", default="tiny", help="preset, HF folder or HF id")
    parser.add_argument("--seq", type=length, default=4096, help="tokens of the generated sample (default: 4k)")
    parser.add_argument("--document", type=Path, help="a text instead of the generated sample; its first --seq tokens")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the generated sample")
    parser.add_argument("--skip-rows", type=count(0), default=SKIP_ROWS, help="rows left out of the recall")
    parser.add_argument("--out", type=output_file, required=True, help="JSON file of the patterns")
    return parser


@command("python -m apb_jax.measure.minference_search")
def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    args = make_parser().parse_args(argv)
    if not 0 <= args.skip_rows < args.seq:
        raise UserError(
            f"--skip-rows is {args.skip_rows}; it must lie in 0..{args.seq - 1} (the sample has {args.seq})"
        )
    text = None if args.document is None else read_text(args.document, "--document")
    import apb_jax
    from apb_jax.synthetic.needle import needle_prompt

    model = apb_jax.load(args.model)
    engine = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1))
    if model.tokenizer is None:
        raise UserError(f"model {args.model} has no tokenizer; the search needs a text")
    if text is not None:
        prompt = engine.prompt(text, "?")
    else:
        sample = needle_prompt(model.tokenizer, args.seq - 64, "8675309", 0.5, args.seed)
        prompt = engine.prompt(sample.document, sample.query)
    document = prompt.document[: max(1, args.seq - len(prompt.query))]
    if len(document) + len(prompt.query) <= args.skip_rows:
        rows = len(document) + len(prompt.query)
        raise UserError(
            f"the sample has {rows} rows, --skip-rows {args.skip_rows} leaves none; give --skip-rows {rows // 2}"
        )
    patterns = search(engine, document, prompt.query, args.skip_rows)
    write_json(args.out, patterns, None)
    print(f"{sum(map(len, patterns))} heads searched on {len(document) + len(prompt.query)} tokens: {args.out}")


if __name__ == "__main__":
    sys.exit(main())

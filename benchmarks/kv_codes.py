"""What 8-bit keys and values lose: `python -m benchmarks.kv_codes [--model tiny --tokens 2048] [--out FILE]`.

A real text goes through the model in float32; in every layer the attention output of its last 64 rows over all keys
(after RoPE) is compared with that over quantised keys and values: relative error in the 2-norm, by code (e4m3, int8)
and by what shares a scale (a token and head; for K also a channel and head over all tokens).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import apb_jax
from apb_jax.command import Parser, command
from apb_jax.kv_codes import CODES, dequantise, quantise
from apb_jax.retaining.labels import causal_attention
from apb_jax.synthetic.packaged import NOVEL
from pallas_kernels.decode_attention import decode_attention

ROWS = 64


def by_token(x: jax.Array, kind: str) -> jax.Array:
    """[B, T, K, D] through codes with a scale a token and head."""
    return dequantise(*quantise(x, CODES[kind]), jnp.float32)


def by_channel(x: jax.Array, kind: str) -> jax.Array:
    """[B, T, K, D] through codes with a scale a channel and head."""
    return jnp.swapaxes(by_token(jnp.swapaxes(x, 1, 3), kind), 1, 3)


def plain(x: jax.Array, kind: str) -> jax.Array:
    """bfloat16, for comparison."""
    del kind
    return x.astype(jnp.bfloat16).astype(jnp.float32)


VARIANTS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "bfloat16": ("fp8", plain, plain),
    "e4m3, K and V by token": ("fp8", by_token, by_token),
    "e4m3, K by channel, V by token": ("fp8", by_channel, by_token),
    "int8, K and V by token": ("int8", by_token, by_token),
    "int8, K by channel, V by token": ("int8", by_channel, by_token),
}


def layer_errors(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Relative error of every variant; q [1, T, H, D], k and v [1, T, K, D] of one layer."""
    tokens = k.shape[1]
    lengths, offset = jnp.full((1,), tokens, jnp.int32), jnp.full((1,), tokens - ROWS, jnp.int32)
    rows = q[:, -ROWS:]

    def out(k: jax.Array, v: jax.Array) -> jax.Array:
        return decode_attention(rows, k, v, lengths, offset, implementation="reference")[0]

    want = out(k, v)
    found = [
        jnp.linalg.norm((out(of_k(k, kind), of_v(v, kind)) - want).ravel()) for kind, of_k, of_v in VARIANTS.values()
    ]
    return jnp.stack(found) / jnp.linalg.norm(want.ravel())


def errors(model: Any, ids: np.ndarray) -> np.ndarray:
    """[layers, variants] of one text."""
    from flax import nnx

    graph, weights = model.graph(), model.place(None)

    @jax.jit
    def run(weights: Any, tokens: jax.Array) -> jax.Array:
        transformer = nnx.merge(graph, weights)

        def attend(inputs: Any, found: jax.Array) -> tuple[Any, jax.Array]:
            q, k = inputs.rotated()
            return causal_attention(q, k, inputs.v), found.at[inputs.layer].set(layer_errors(q, k, inputs.v))

        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        empty = jnp.zeros((model.config.num_layers, len(VARIANTS)), jnp.float32)
        return transformer.run_layers(transformer.embed(tokens), places, attend, empty)[1]

    return np.asarray(run(weights, jnp.asarray(ids)[None]))


@command("python -m benchmarks.kv_codes")
def main(argv: list[str]) -> None:
    """See the module's text."""
    parser = Parser(prog="python -m benchmarks.kv_codes", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line there")
    args = parser.parse_args(argv)
    model = apb_jax.load(args.model, dtype="float32")
    text = NOVEL.read_text(encoding="utf-8")[: 12 * args.tokens]
    ids = np.asarray(model.tokenizer.encode(text, add_special_tokens=False, verbose=False)[: args.tokens], np.int32)
    found = errors(model, ids)
    print(f"{args.model}, {len(ids)} tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, column in zip(VARIANTS, found.T, strict=True):
        print(f"{name:<32} mean {column.mean():.3%}   worst layer {column.max():.3%} ({int(column.argmax())})")
    if args.out:
        rows = dict(zip(VARIANTS, found.T.tolist(), strict=True))
        facts = {"benchmark": "kv_codes", "model": args.model, "tokens": len(ids), "jax": jax.__version__}
        with args.out.open("a") as file:
            file.write(json.dumps({**facts, "relative_error_by_layer": rows}) + "\n")


if __name__ == "__main__":
    sys.exit(main())

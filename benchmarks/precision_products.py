"""The linear layers in bf16 and e4m3: with stages left out, as the model runs them, and as a decoding step does."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apb_jax.attention.inputs import LayerInputs
from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import Where, rms_norm
from apb_jax.model.products import project
from apb_jax.model.transformer import Transformer
from benchmarks.precision_hlo import hlo_facts
from pallas_kernels.float8 import CUBLAS_ONLY, dequantise, product, quantise
from pallas_kernels.skinny_matmul import skinny_matmul
from pallas_kernels.skinny_matmul.call import make_call
from pallas_kernels.skinny_matmul.triton import Config, triton

PARITY_ROWS = 512
ARITHMETIC_LIMIT = 1e-2
"""Relative to the largest value: a product of e4m3 operands against the same in float32 (bf16 output, short sums)."""
WIDTH = tuple[int, int]
ROWS_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
"""Matrix -> the first one that reads the same rows: rows are quantised once for all of those."""


def shapes_of(config: ModelConfig) -> dict[str, WIDTH]:
    """The seven matrices of a layer, [out, in]."""
    e, m, q, kv = (
        config.hidden_size, config.intermediate_size,
        config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim,
    )  # fmt: skip
    return {"q": (q, e), "k": (kv, e), "v": (kv, e), "o": (e, q), "gate": (m, e), "up": (m, e), "down": (e, m)}


def compiled(run: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None) -> tuple[Any, float]:
    """(program, seconds of compilation)."""
    started = time.perf_counter()
    gpu = jax.default_backend() == "gpu"
    program = jax.jit(run).lower(*args).compile(compiler_options=options if gpu else None)
    return program, time.perf_counter() - started


def seconds(program: Callable[..., Any], *args: Any, calls: int = 8, repeats: int = 3) -> float:
    """Median over ``repeats`` of the mean of ``calls`` that were queued together, after a warm-up."""
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([program(*args) for _ in range(calls)][-1])
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def distance(got: jax.Array, want: jax.Array) -> float:
    """Frobenius norm of the difference over that of ``want``."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def flops(config: ModelConfig, rows: int) -> float:
    """Of the seven products of a layer."""
    return sum(2.0 * rows * out * inner for out, inner in shapes_of(config).values())


class Inputs:
    """Random rows and matrices of one layer, bf16 and quantised."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        keys = iter(jax.random.split(jax.random.key(0), 16))
        shapes = shapes_of(config)
        self.x = {
            name: jax.random.normal(next(keys), (rows, shapes[name][1]), jnp.bfloat16)
            for name in dict.fromkeys(ROWS_OF.values())
        }
        self.w = {name: jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[1] ** -0.5
                  for name, shape in shapes_of(config).items()}  # fmt: skip
        self.w8 = {name: jax.jit(quantise)(w) for name, w in self.w.items()}
        self.x8 = {n: jax.jit(quantise)(x) for n, x in self.x.items()}


def parity(config: ModelConfig, inputs: Inputs) -> dict[str, Any]:
    """Each product on a part of the rows against float32: bf16, fp8, and fp8 against the same operands in float32."""
    exact = functools.partial(jnp.matmul, precision="highest")

    def forms(x: Any, w: Any, x8: Any, w8: Any) -> tuple[Any, ...]:
        (xv, xs), (wv, ws) = x8, w8  # rounded before: inside one program XLA may leave a rounding and its undoing out
        return (
            exact(x.astype(jnp.float32), w.astype(jnp.float32).T), project(x[None], w.T)[0],
            product(xv, wv, jnp.bfloat16) * xs * ws[:, 0], exact(dequantise(xv, xs), dequantise(wv, ws).T),
        )  # fmt: skip

    found: dict[str, Any] = {}
    programs: dict[WIDTH, Any] = {}
    for name, shape in shapes_of(config).items():
        rows = jax.tree.map(lambda a: a[:PARITY_ROWS], (inputs.x[ROWS_OF[name]], inputs.x8[ROWS_OF[name]]))
        args = rows[0], inputs.w[name], rows[1], inputs.w8[name]
        if shape not in programs:
            programs[shape] = compiled(forms, *args, options=CUBLAS_ONLY)[0]
        want, wide, got, same = programs[shape](*args)
        found[name] = {
            "bf16": distance(wide, want), "fp8": distance(got, want), "fp8_arithmetic": distance(got, same),
        }  # fmt: skip
    return found


def stages(config: ModelConfig, inputs: Inputs) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Variant -> (program, arguments): all seven products, with ever more of what belongs to them."""
    x, w, x8, w8 = inputs.x, inputs.w, inputs.x8, inputs.w8

    def bf16(x: Any, w: Any) -> Any:
        return [project(x[ROWS_OF[name]][None], m.T) for name, m in w.items()]

    def alone(x8: Any, w8: Any) -> Any:
        return [product(x8[ROWS_OF[name]][0], m[0], jnp.bfloat16) for name, m in w8.items()]

    def scaled(x8: Any, w8: Any) -> Any:
        plain = alone(x8, w8)
        return [(y.astype(jnp.float32) * x8[ROWS_OF[name]][1] * m[1][:, 0]).astype(jnp.bfloat16)
                for y, (name, m) in zip(plain, w8.items(), strict=True)]  # fmt: skip

    def quantised(x: Any, w8: Any) -> Any:
        rows = {n: quantise(a) for n, a in x.items()}
        return scaled(rows, w8)

    def quantising(x: Any) -> Any:
        return {n: quantise(a) for n, a in x.items()}

    def norm(x: Any) -> Any:
        return quantise(rms_norm(x["q"], jnp.ones(config.hidden_size, jnp.bfloat16), 1e-5))

    def swiglu(x: Any) -> Any:
        gate = x["down"]
        return quantise(jax.nn.silu(gate) * gate)

    return {
        "bf16 products": (bf16, (x, w)),
        "fp8 products alone": (alone, (x8, w8)),
        "fp8 products + scales": (scaled, (x8, w8)),
        "fp8 products + scales + quantisation": (quantised, (x, w8)),
        "quantisation alone, four blocks of rows": (quantising, (x,)),
        "norm + quantisation": (norm, (x,)),
        "swiglu + quantisation": (swiglu, (x,)),
    }


class Model:
    """A few layers of the model, its attention left out, in bf16 or e4m3."""

    def __init__(self, config: ModelConfig, layers: int, fp8: bool) -> None:
        self.config = dataclasses.replace(config, num_layers=layers, vocab_size=256)
        make = functools.partial(Transformer, self.config, dtype=jnp.bfloat16, fp8=fp8)
        self.graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
        self.state = jax.jit(lambda: nnx.state(make(rngs=nnx.Rngs(0))))()

    def run(self, state: Any, x: jax.Array, start: jax.Array, *, in_place: bool) -> jax.Array:
        """All layers on [1, rows, hidden size]; for attention the sum of its inputs: none may go unused."""
        positions = jnp.zeros(x.shape[:2], jnp.int32)
        model = nnx.merge(self.graph, state)
        where = Where(in_place=in_place)

        def summed(inputs: LayerInputs, carry: Any) -> tuple[jax.Array, Any]:
            groups = inputs.q.shape[2] // inputs.k.shape[2]
            return inputs.q + jnp.repeat(inputs.k + inputs.v, groups, axis=2), carry

        out, _ = model.run_layers(
            x, positions, summed, (), start=start, count=self.config.num_layers,
            where=where,
        )  # fmt: skip
        return out

    def program(self, rows: int, *, in_place: bool, options: Any) -> tuple[Callable[[], Any], float, str]:
        """(call, seconds of compilation, optimised HLO)."""
        x = jax.random.normal(jax.random.key(1), (1, rows, self.config.hidden_size), jnp.bfloat16)
        run = functools.partial(self.run, in_place=in_place)
        program, took = compiled(run, self.state, x, jnp.int32(0), options=options)
        return functools.partial(program, self.state, x, jnp.int32(0)), took, program.as_text()

    @property
    def facts(self) -> Any:
        """Shapes of a layer's matrices, for ``hlo_facts``."""
        return shapes_of(self.config).values()


def layer_hlo(model: Model, text: str) -> str:
    """``hlo_facts`` in words."""
    return str(hlo_facts(text, model.facts))


def read_ceiling(count: int) -> float:
    """Bytes a second of a reduction over ``count`` bytes: what reading alone reaches here."""
    x = jnp.ones(count // 4, jnp.float32)
    return count / seconds(jax.jit(lambda a: jnp.max(a)), x)


def skinny_configs() -> dict[str, Config]:
    """Of the kernel on e4m3 matrices: the default and its neighbours."""
    others = ((64, 128, 4, 4, 2), (64, 128, 3, 4, 4), (64, 256, 3, 4, 2), (32, 256, 3, 4, 4))
    found = {"default": Config()}
    for columns, depth, stages, warps, blocks in others:
        name = f"{columns} x {depth}, {stages} stages, {warps} warps, {blocks} blocks"
        found[name] = Config(columns, depth, stages, warps, blocks)
    return found


def skinny_of(config: Config | None, implementation: str | None) -> Callable[..., tuple[jax.Array, ...]]:
    """``skinny_matmul`` of (rows, stacks, layer) by name, or its Triton kernel with tiles of one's own."""
    if config is None:
        return functools.partial(skinny_matmul, implementation=implementation)
    return lambda x, stacks, layer: triton(make_call(x, stacks, layer, None, None), config)


def skinny_error(stacks: list[jax.Array], x: jax.Array, config: Config | None, implementation: str | None) -> float:
    """The largest distance of a product of the last layer to the reference in float32."""
    last = jnp.int32(stacks[0].shape[0] - 1)
    got, want = (
        jax.jit(run)(x, stacks, last) for run in (skinny_of(config, implementation), skinny_of(None, "reference"))
    )
    return max(distance(ours, theirs) for ours, theirs in zip(got, want, strict=True))


def skinny(
    stacks: list[jax.Array], x: jax.Array, config: Config | None, implementation: str | None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A program that multiplies ``x`` with the matrices of every layer in turn, each product waiting for the last."""

    def one(x: jax.Array, layer: jax.Array, stacks: list[jax.Array]) -> tuple[jax.Array, None]:
        out = skinny_of(config, implementation)(x, stacks, layer)
        return x + sum(o[:, :1] for o in out).astype(x.dtype) * 0, None

    def run(x: jax.Array, stacks: list[jax.Array]) -> jax.Array:
        body = functools.partial(one, stacks=stacks)
        return jax.lax.scan(body, x, jnp.arange(stacks[0].shape[0], dtype=jnp.int32))[0]

    return run, (x, stacks)

"""What a layer of a method moves between shards, read off the program that runs: collectives and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.method import AttentionMethod
from apb_jax.engine import Engine
from apb_jax.mesh import SP
from apb_jax.prefill import PrefillRows, PrefillState, layers_program
from apb_jax.programs import Lengths
from apb_jax.quantised_cache import cache_dtype, cache_kind

COLLECTIVES = ("all_gather", "all_to_all", "ppermute", "psum", "pmax", "reduce_scatter")


@dataclass(frozen=True)
class Traffic:
    """Of one prefill layer, over the sequence axis: collectives of each kind, and the bytes that a shard receives."""

    collectives: dict[str, int]
    received_bytes: int


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, inner jaxprs included; the body of a scan once."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(leaf, "jaxpr"):
                yield from equations(leaf.jaxpr)
            elif hasattr(leaf, "eqns"):
                yield from equations(leaf)


def received(name: str, sent: int, made: int, members: int) -> float:
    """Bytes that one of ``members`` receives; reductions as a ring: their value twice, less one share."""
    if name == "ppermute":
        return made
    if name in ("all_gather", "all_to_all"):
        return made * (members - 1) / members
    return 2 * sent * (members - 1) / members


def layer_traffic(engine: Engine, method: AttentionMethod, prompts: list[Prompt]) -> Traffic:
    """Of ``method`` on the engine's shards for these prompts; traced with shapes only, nothing runs."""
    placement = engine.placement
    config, shards, dtype = engine.model.config, placement.shards, engine.model.dtype
    layout = method.layout(prompts, shards)
    batch, _, rows = layout.tokens.shape
    shape = jax.ShapeDtypeStruct
    kv, kept = engine.settings.precision.kv, layout.kept_capacity * shards
    cache = jax.eval_shape(lambda: cache_kind(kv).zeros(config, batch, kept, cache_dtype(kv, dtype)))
    lengths = Lengths.of(layout, np.asarray([len(p.query) for p in prompts], np.int32), placement)
    hidden, places = shape((batch, rows * shards, config.hidden_size), dtype), shape((batch, rows * shards), np.int32)
    rows_in = PrefillRows(places, lengths)  # type: ignore[arg-type]
    state = PrefillState(hidden, cache)  # type: ignore[arg-type]
    program = layers_program(engine.programs, method, 1, state)
    traced = jax.make_jaxpr(program)(engine.state, state, rows_in, shape((), np.int32))
    counts: Counter[str] = Counter()
    total = 0.0
    for equation in equations(traced.jaxpr):
        name = equation.primitive.name.removesuffix("_invariant").removesuffix("2")
        axes = equation.params.get("axis_name", equation.params.get("axes", ()))
        if name in COLLECTIVES and SP in (axes if isinstance(axes, tuple) else (axes,)):
            counts[name] += 1
            sent, made = (sum(v.aval.size * v.aval.dtype.itemsize for v in side) for side in
                          (equation.invars, equation.outvars))  # fmt: skip
            groups = equation.params.get("axis_index_groups")
            total += received(name, sent, made, len(groups[0]) if groups else placement.devices)
    return Traffic(dict(counts), round(total))

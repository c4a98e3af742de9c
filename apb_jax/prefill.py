"""The prefill's device programs: documents through the layers, their KV into the cache, around one state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import LayerInputs
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.placement import Placement
from apb_jax.mesh import SP
from apb_jax.model.heads import FoldedRetainingHead
from apb_jax.programs import Lengths, Programs, Recipe
from apb_jax.quantised_cache import AnyCache

GROUPS = 8
"""At most so many groups are the layers cut into: what progress is reported by."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillState:
    """What goes from layer to layer, donated to each program: hidden rows, and the KV kept so far."""

    x: Float[Array, "B N*S E"]
    cache: AnyCache | None
    """None: a layer's KV is dropped behind its attention."""

    def specs(self) -> PrefillState:
        """Rows over ``sp``."""
        cache = None if self.cache is None else self.cache.specs()
        return PrefillState(P(None, SP, None), cache)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillRows:
    """What stays the same in all layers: positions of the local rows, and the lengths of the requests."""

    positions: Int[Array, "B N*S"]
    lengths: Lengths


def each_shard(placement: Placement, function: Callable[..., Any], inputs: LayerInputs, *rows: Any) -> Any:
    """``function(inputs, *rows)`` for every shard of this device, each with its own rows.

    Arrays of ``rows`` and of the result have their rows in axis 1. Retaining heads multiply all rows of the device at
    once before they are split.
    """
    if placement.local == 1:
        return function(inputs, *rows)
    head = inputs.retaining
    hidden = None if head is None else head.hidden(inputs.q, inputs.k, inputs.v, inputs.tp_axis)

    def one(q: Any, k: Any, v: Any, cos: Any, sin: Any, positions: Any, hidden: Any, *rows: Any) -> Any:
        scorer = None if head is None else FoldedRetainingHead(hidden, head.fc2)
        own = replace(inputs, q=q, k=k, v=v, cos=cos, sin=sin, positions=positions, retaining=scorer)
        return function(own, *rows)

    x = inputs
    return placement.each_shard(one, x.q, x.k, x.v, x.cos, x.sin, x.positions, hidden, *rows)


def embed(programs: Programs, weights: nnx.State, tokens: Int[Array, "B N*S"]) -> Float[Array, "B N*S E"]:
    """Token embeddings of all local rows."""
    make = lambda: programs.traced(  # noqa: E731 - one line a program
        lambda weights, tokens: programs.model(weights).embed(tokens), (programs.specs, P(None, SP)), P(None, SP, None)
    )
    return programs.call("embed", None, make, (weights, tokens))


def layers_program(programs: Programs, method: AttentionMethod, count: int, kept: PrefillState) -> Any:
    """The jitted program (weights, state, rows, first layer) -> state of ``count`` layers in one scan.

    ``kept``: a state of the structure that goes in and comes out.
    """

    kernels = replace(programs.kernels, exchange=programs.precision.kv)

    def prefill_layers(weights: Any, state: PrefillState, rows: PrefillRows, start: Any) -> PrefillState:
        def one_shard(inputs: LayerInputs) -> tuple[Any, Any, Any]:
            out, (k, v) = method.prefill(inputs, rows.lengths.shard(), kernels)
            return out, k, v

        def attend(inputs: LayerInputs, cache: AnyCache | None) -> tuple[Any, AnyCache | None]:
            out, k, v = each_shard(rows.lengths.placement, one_shard, inputs)
            return out, None if cache is None else cache.write(inputs.layer - first, k, v)

        model = programs.model(weights)
        # A cache of these layers alone, not of all.
        first = start if state.cache is not None and state.cache.layers == count else 0
        x, cache = model.run_layers(
            state.x, rows.positions, attend, state.cache, start=start, count=count, where=programs.where
        )
        return PrefillState(x, cache)

    state, rows = kept.specs(), PrefillRows(P(None, SP), P())  # type: ignore[arg-type]
    return programs.traced(prefill_layers, (programs.specs, state, rows, P()), state, donate=(1,))


def prefill_recipe(programs: Programs, method: AttentionMethod, count: int, kept: PrefillState) -> Recipe:
    """What ``Programs`` compiles for ``count`` layers."""
    return "prefill", (method, count), lambda: layers_program(programs, method, count, kept)


def layer_groups(layers: int) -> int:
    """Into how many equal groups the layers are cut for the progress bar: the largest divisor up to GROUPS."""
    return max(n for n in range(1, GROUPS + 1) if layers % n == 0)


def run(
    programs: Programs,
    method: AttentionMethod,
    weights: nnx.State,
    tokens: Int[Array, "B N*S"],
    rows: PrefillRows,
    cache: AnyCache | None,
    size: int | None = None,
) -> Iterator[tuple[int, PrefillState]]:
    """(layers done, state) before the first and after every group of layers, each finished on the devices.

    A state is donated to the next group: only the last one can be kept. Who stops asking stops the prefill.
    ``cache`` None keeps no KV; ``size``: layers of a group, a divisor of all (default: ``layer_groups``).
    """
    layers = programs.config.num_layers
    size = size or layers // layer_groups(layers)
    state = PrefillState(embed(programs, weights, tokens), cache)
    yield 0, state
    for first in range(0, layers, size):
        start = programs.place(np.int32(first))
        state = programs.call(*prefill_recipe(programs, method, size, state), (weights, state, rows, start))
        jax.block_until_ready(state)
        yield first + size, state

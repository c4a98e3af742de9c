"""The decoder-only transformer (Flax nnx): embedding, scanned layers, final norm, head."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apb_jax.model.config import LayerSpec, ModelConfig
from apb_jax.model.layers import Attend, DecoderLayers, Rows, Where, rms_norm
from apb_jax.model.stacked import FEW_ROWS, one_layer
from apb_jax.model.weights import BY_PATH
from apb_jax.rope.base import rope_table

WHOLE = Where()
"""Every weight whole on the device."""


class Transformer(nnx.Module):
    """A Llama-family or Qwen decoder. The attention itself is handed in with every call."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        retaining_hidden: int | None = None,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
        folded_heads: bool = False,
        fp8: bool = False,
    ) -> None:
        """Random weights; ``retaining_hidden``: width of the retaining heads' fc1, None for none.

        ``folded_heads``: fc1 is folded into the projections (``apb_jax/weights/folding.py``). ``fp8``: the layers'
        matrices are quantised, those of the same seed otherwise.
        """
        self.config = config

        def param(path: str) -> nnx.Param:
            weight = BY_PATH[path]
            return nnx.Param(weight.initial(weight.shape(config.sizes()), rngs.params, dtype))

        self.embedding = param("embedding")
        self.layers = DecoderLayers(
            config, retaining_hidden=retaining_hidden, dtype=dtype, rngs=rngs, folded_heads=folded_heads, fp8=fp8
        )
        self.norm = param("norm")
        if not config.tie_embeddings:
            self.head = param("head")

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
        """Rows of the embedding table."""
        return self.embedding[...][tokens]

    def run_layers(
        self,
        x: Float[Array, "B S E"],
        positions: Int[Array, "B S"],
        attend: Attend,
        carry: Any,
        *,
        start: Int[Array, ""] | int | None = None,
        count: int | None = None,
        where: Where = WHOLE,
        remat: bool = False,
    ) -> tuple[Float[Array, "B S E"], Any]:
        """``count`` layers from layer ``start`` on (all layers by default); compile time does not grow with depth.

        Without ``start`` the weights are handed to the loop; with it they are indexed inside, so that one program
        serves every group of layers of a model whose layers are alike. Layers that are not alike are one loop each
        stretch of equal ones; where ``start`` is known to the device alone, every step chooses among their kinds.
        """
        graph, weights = nnx.split(self.layers)
        where = replace(where, in_place=where.in_place and x.shape[0] * x.shape[1] <= FEW_ROWS)
        kinds = tuple(dict.fromkeys(run.spec for run in self.config.runs))
        ropes = {spec: spec.rope or self.config.rope for spec in kinds}
        tables = {rope: rope_table(rope, self.config.head_dim, positions) for rope in ropes.values()}

        def layer_of(spec: LayerSpec, state: tuple[Any, Any], step: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
            layer, sliced = step
            if sliced is None:
                sliced = jax.tree_util.tree_map_with_path(functools.partial(one_layer, layer, where.in_place), weights)
            module = nnx.merge(graph, sliced)
            rows = Rows(positions, *tables[ropes[spec]], ropes[spec])
            return module(state[0], rows, layer, spec, attend, state[1], where), None

        def any_layer(state: tuple[Any, Any], step: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
            numbers = [kinds.index(self.config.spec(layer)) for layer in range(self.config.num_layers)]
            branches = [functools.partial(layer_of, spec) for spec in kinds]
            return jax.lax.switch(jnp.asarray(numbers)[step[0]], branches, state, step)

        def scan(body: Any, state: tuple[Any, Any], low: int, high: int) -> tuple[Any, Any]:
            own = _between(weights, low, high, self.config.num_layers)
            xs = jnp.arange(low, high, dtype=jnp.int32), own
            return jax.lax.scan(jax.checkpoint(body) if remat else body, state, xs)[0]

        def count_up(body: Any, state: tuple[Any, Any], low: int, high: int, ahead: Array | int = 0) -> tuple[Any, Any]:
            # The number of a layer is the loop's own counter: a step launches nothing to look it up. The bounds are
            # constants, else XLA asks the device before every step whether there is another.
            def step(at: tuple[Array, tuple[Any, Any]]) -> tuple[Array, tuple[Any, Any]]:
                return at[0] + 1, body(at[1], (at[0] + ahead, None))[0]

            return jax.lax.while_loop(lambda at: at[0] < high, step, (jnp.int32(low), state))[1]

        runs, last = self.config.runs, self.config.num_layers
        state = (x, carry)
        if start is None or isinstance(start, int):
            first = start or 0
            last = first + count if count else last
            for run in runs:
                low, high = max(run.start, first), min(run.start + run.count, last)
                if low < high:
                    loop = scan if start is None else count_up
                    state = loop(functools.partial(layer_of, run.spec), state, low, high)
            return state
        body = functools.partial(layer_of, runs[0].spec) if len(runs) == 1 else any_layer
        return count_up(body, state, 0, count or last, ahead=start)

    def logits(self, x: Float[Array, "B S E"], where: Where = WHOLE) -> Float[Array, "B S V"]:
        """Final norm and head, float32; an ``all_gather`` over each axis that the head's columns are split over."""
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        tied, slices = self.config.tie_embeddings, where.slices
        head = self.embedding[...] if tied else self.head[...]
        head = slices.part(head, 0 if tied else 1) if slices else head
        out = jnp.einsum(
            "bse,ve->bsv" if tied else "bse,ev->bsv", x, head, precision=precision, preferred_element_type=jnp.float32
        )
        for axis in (slices.axis if slices else None, None if tied else where.tp_axis):
            out = jax.lax.all_gather(out, axis, axis=2, tiled=True) if axis else out
        return out


def _between(weights: nnx.State, low: int, high: int, layers: int) -> nnx.State:
    """The weights of layers ``low`` to ``high``; all of them as they are."""
    if high - low == layers:
        return weights
    return jax.tree.map(lambda weight: weight[low:high], weights)

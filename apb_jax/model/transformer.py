"""The decoder-only transformer (Flax nnx): embedding, scanned layers, final norm, head."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import Attend, DecoderLayers, rms_norm
from apb_jax.model.slices import WeightSlices
from apb_jax.model.stacked import FEW_ROWS, one_layer
from apb_jax.rope.base import rope_table

TP_COLUMNS = frozenset({"q", "k", "v", "gate", "up", "q_bias", "k_bias", "v_bias", "fc2"})
TP_ROWS = frozenset({"o", "down", "fc1_q", "fc1_k", "fc1_v"})


class Transformer(nnx.Module):
    """A Llama-family or Qwen2 decoder. The attention itself is handed in with every call."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        retaining_hidden: int | None = None,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
        folded_heads: bool = False,
    ) -> None:
        """Random weights; ``retaining_hidden``: width of the retaining heads' fc1, None for none.

        ``folded_heads``: fc1 is folded into the projections (``apb_jax/weights/folding.py``).
        """
        self.config = config
        scale = jnp.asarray(0.02, dtype)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)
        self.layers = DecoderLayers(
            config, retaining_hidden=retaining_hidden, dtype=dtype, rngs=rngs, folded_heads=folded_heads
        )
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(rngs.params(), shape[::-1], dtype) * scale)

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
        start: Int[Array, ""] | None = None,
        count: int | None = None,
        tp_axis: str | None = None,
        slices: WeightSlices | None = None,
        remat: bool = False,
        in_place: bool = False,
    ) -> tuple[Float[Array, "B S E"], Any]:
        """``count`` layers from layer ``start`` on (all layers by default); compile time does not grow with depth.

        With ``start`` the weights are indexed inside the loop, so one program serves every group of layers; with
        ``slices`` each device of their axis reads its part of the weights only. ``in_place``: matrices are multiplied
        where they lie in their stacks, where the rows are few.
        """
        graph, weights = nnx.split(self.layers)
        in_place = in_place and x.shape[0] * x.shape[1] <= FEW_ROWS
        cos, sin = rope_table(self.config.rope, self.config.head_dim, positions)

        def body(state: tuple[Any, Any], step: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
            layer, sliced = step
            if sliced is None:
                sliced = jax.tree_util.tree_map_with_path(functools.partial(one_layer, layer, in_place), weights)
            module = nnx.merge(graph, sliced)
            return module(state[0], cos, sin, positions, layer, attend, state[1], tp_axis, slices), None

        steps = jnp.arange(count or self.config.num_layers, dtype=jnp.int32)
        xs = (steps, weights) if start is None else (start + steps, None)
        (x, carry), _ = jax.lax.scan(jax.checkpoint(body) if remat else body, (x, carry), xs)
        return x, carry

    def logits(
        self, x: Float[Array, "B S E"], tp_axis: str | None = None, slices: WeightSlices | None = None
    ) -> Float[Array, "B S V"]:
        """Final norm and head, float32; an ``all_gather`` over each axis that the head's columns are split over."""
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        tied = self.config.tie_embeddings
        head = self.embedding[...] if tied else self.head[...]
        head = slices.part(head, 0 if tied else 1) if slices else head
        out = jnp.einsum(
            "bse,ve->bsv" if tied else "bse,ev->bsv", x, head, precision=precision, preferred_element_type=jnp.float32
        )
        for axis in (slices.axis if slices else None, None if tied else tp_axis):
            out = jax.lax.all_gather(out, axis, axis=2, tiled=True) if axis else out
        return out


def partition_specs(state: nnx.State, tp_axis: str = "tp") -> nnx.State:
    """Megatron-style specs for a Transformer's state: heads and FFN columns over ``tp_axis``, the rest replicated."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        name = next(n for n in reversed(names) if n != "value")
        rank = len(leaf.shape)
        if name in TP_COLUMNS:
            return PartitionSpec(*[None] * (rank - 1), tp_axis)
        if name in TP_ROWS:
            return PartitionSpec(*[None] * (rank - 2), tp_axis, None)
        if name == "head":
            return PartitionSpec(None, tp_axis)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)

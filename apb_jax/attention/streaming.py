"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453); in prefill MInference's A-shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, Queries, attend, keys_of, project
from apb_jax.attention.inputs import Cached, KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.merge import merge_partials, merge_shards
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.remapped import Border, Interval, remapped_attention
from apb_jax.attention.window import sliding_window
from apb_jax.errors import UserError
from apb_jax.rope.base import rope_table, rotate
from pallas_kernels.flash_attention import RowSegment

GENERATION = ("dense", "window")


def a_shape(
    queries: Queries, keys: Keys, sinks: int, window: int, kernels: Kernels
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """Row t over the keys with t - j < window, and the first ``sinks`` tokens; (out float32, lse_nat)."""
    rows = queries.rows
    near = sliding_window(queries, keys, window, kernels)
    sinks = min(sinks, rows)
    if rows <= window or not sinks:
        return near
    far = RowSegment(rows, start=0, offset=-window, end=sinks)
    return merge_partials([near, attend(queries, (keys_of(keys, 0, sinks),), (far,), kernels)])


@dataclass(frozen=True)
class Streaming(AttentionMethod):
    """The first ``sink_tokens`` and the last ``window_tokens`` at their positions (the MInference paper's baseline).

    ``generation``: "dense" lets query and answer see all of the document (as that baseline does); "window" only the
    sinks and the last tokens, the sinks at the distance that they have in StreamingLLM's rolling cache.
    """

    sink_tokens: int = 1024
    window_tokens: int = 4096
    generation: str = "dense"

    name: ClassVar[str] = "streaming"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False, selects=True, paper="StreamingLLM, arXiv 2309.17453", max_shards=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens < 0:
            raise UserError(f"sink_tokens is {self.sink_tokens}; it must be 0 or more")
        if self.window_tokens < 1:
            raise UserError(f"window_tokens is {self.window_tokens}; it must be at least 1")
        if self.generation not in GENERATION:
            raise UserError(f"generation {self.generation!r} is unknown; choose one of {', '.join(GENERATION)}")

    @classmethod
    def refuse(cls, setup: Setup, options: Mapping[str, Any]) -> str | None:
        if options.get("generation") == "window" and setup.config.rope.kind == "string":
            return (
                "generation 'window' moves sinks to positions of its own, which --rope string cannot remap; use 'dense'"
            )
        return super().refuse(setup, options)

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """With window generation never: the answer may grow out of it."""
        reach = self.sink_tokens + self.window_tokens
        if self.generation == "dense" and max(len(p.document) for p in prompts) <= reach:
            return f"sinks and window, {reach} tokens together, hold the whole document"
        return None

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        return chunk_layout(prompts, np.arange(shards)[:, None])

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, keys = project(x)
        out, _ = a_shape(queries, keys, self.sink_tokens, self.window_tokens, kernels)
        return out.astype(x.q.dtype), (keys.k, keys.v)

    def decode(self, x: LayerInputs, cached: Cached, shard: Shard) -> Float[Array, "B M H D"]:
        if self.generation == "dense":
            return super().decode(x, cached, shard)
        q, sinks, window = x.rotated()[0], self.sink_tokens, self.window_tokens
        # In the rolling cache a query stands at most behind sinks + window slots; the recent keys keep their distances.
        slot = jnp.minimum(x.positions, sinks + window)
        at_slot = rotate(x.q, *rope_table(x.rope, q.shape[-1], slot))
        oldest = jnp.maximum(x.positions - window, 0)
        stop = jnp.broadcast_to(cached.kept_tokens[:, None], oldest.shape)
        tail_first = jnp.maximum(oldest - cached.tail_position[:, None], 0)
        row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        document = cached.document.alone(x.q.dtype)

        def part(query: Array, kv: tuple[Array, Array], first: Array, end: Array) -> tuple[Array, Array]:
            place = jnp.zeros(kv[0].shape[:3], jnp.int32)
            seen = Interval(first, end)
            return remapped_attention(query, query, *kv, jnp.zeros_like(first), place, seen, Border(offset=1))

        parts = [
            part(at_slot, document, jnp.zeros_like(oldest), jnp.minimum(jnp.minimum(oldest, sinks), stop)),
            part(q, document, oldest, stop),
            part(q, cached.tail.alone(x.q.dtype), tail_first, cached.tail_offset[:, None] + row + 1),
        ]
        return merge_shards(*merge_partials(parts), shard.placement).astype(q.dtype)

"""Ulysses: all_to_all from sequence shards to head shards and back (arXiv 2309.14509), alone or inside a ring.

Where heads do not divide the shards, groups of neighbours exchange heads and the groups form a zigzag ring (the
hybrid of arXiv 2405.07719). KV heads are replicated only as far as a shard's query heads need them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, Queries, project
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.ring import RingAxis, ring_attention, ring_order
from apb_jax.errors import UserError
from apb_jax.mesh import SP


def ring_shards_for(heads: int, shards: int) -> int:
    """The smallest ring that leaves groups whose size divides the query heads."""
    return shards // math.gcd(heads, shards)


def kv_slots(heads: int, kv_heads: int, parts: int) -> np.ndarray:
    """Which KV head stands in each slot of each part, int [parts, slots]: every part's query heads share slots evenly.

    With KV heads that ``parts`` divides this is a plain split; with fewer, each part gets the one it needs.
    """
    own, group = heads // parts, heads // kv_heads
    share = math.gcd(own, group)  # neighbouring query heads that surely use the same KV head
    return (np.arange(0, heads, share) // group).reshape(parts, own // share)


@dataclass(frozen=True)
class Ulysses(AttentionMethod):
    """Exact attention over all rows for a part of the heads; two ``all_to_all`` a layer.

    ``ring_shards``: 1 is Ulysses as published; R > 1 makes R groups of N / R shards that form a zigzag ring.
    """

    ring_shards: int = 1

    name: ClassVar[str] = "ulysses"
    can: ClassVar[Capabilities] = Capabilities(
        exact=True, paper="DeepSpeed Ulysses, arXiv 2309.14509", tested=("exact limit", "shards agree")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ring_shards < 1:
            raise UserError(f"ring_shards is {self.ring_shards}; it must be at least 1")

    @classmethod
    def refuse(cls, setup: Setup, options: Mapping[str, Any]) -> str | None:
        ring, heads, shards = options.get("ring_shards"), setup.config.num_heads // setup.tp, setup.shards
        if ring is not None and (ring < 1 or shards % ring or heads % (shards // ring)):
            legal = [r for r in range(1, shards + 1) if shards % r == 0 and heads % (shards // r) == 0]
            nearest = min(legal, key=lambda r: (abs(r - ring), r))
            return (
                f"ring_shards {ring} of {shards} shards leaves groups that {heads} query heads cannot be split over; "
                f"nearest legal choice: ring_shards {nearest}"
            )
        return super().refuse(setup, options)

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """Pure where the heads allow it, else the smallest ring."""
        return cls(**{"ring_shards": ring_shards_for(setup.config.num_heads // setup.tp, setup.shards), **options})

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        group = shards // self.ring_shards
        if self.ring_shards == 1:
            return chunk_layout(prompts, np.arange(shards)[:, None])
        pieces = ring_order(self.ring_shards, "zigzag")  # chunks of a group, each cut over the group's shards
        order = pieces[:, None, :] * group + np.arange(group)[None, :, None]
        return chunk_layout(prompts, order.reshape(shards, 2))

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, keys = project(x)
        parts, pieces = shard.count // self.ring_shards, 1 if self.ring_shards == 1 else 2
        groups = [list(range(g * parts, (g + 1) * parts)) for g in range(self.ring_shards)]
        index_groups = groups if self.ring_shards > 1 else None
        batch, rows, heads, dim = queries.near.shape
        slots = kv_slots(heads, keys.k.shape[2], parts)

        def split(a: Float[Array, "B S h D"]) -> Float[Array, "B S parts own D"]:
            return a.reshape(batch, rows, parts, -1, dim)

        # One message: a shard's part of the query heads and the KV slots that these need.
        sent = [split(queries.near), *([] if queries.far is None else [split(queries.far)])]
        sent += [split(a[:, :, slots.reshape(-1)]) for a in (keys.k, keys.v)]
        message = jnp.concatenate(sent, axis=3)
        if parts > 1:
            message = jax.lax.all_to_all(message, SP, 2, 1, axis_index_groups=index_groups)
        else:
            message = jnp.moveaxis(message, 2, 1)

        def in_order(a: Float[Array, "B parts S *rest"]) -> Float[Array, "B T *rest"]:
            """Rows of the group in document order: pieces first, then shards."""
            a = a.reshape(batch, parts, pieces, rows // pieces, *a.shape[3:])
            return jnp.swapaxes(a, 1, 2).reshape(batch, parts * rows, *a.shape[4:])

        places = None
        if queries.positions is not None:
            places = jax.lax.all_gather(queries.positions, SP, axis=1, axis_index_groups=index_groups)
            places = in_order(places)
        own, width = heads // parts, slots.shape[1]
        cuts = np.cumsum([own] * (1 if queries.far is None else 2) + [width])
        *q, k, v = jnp.split(in_order(message), cuts, axis=2)
        group_queries = Queries(q[0], q[1] if len(q) > 1 else None, places, queries.rope)
        ring = RingAxis(
            shard.index // parts,
            self.ring_shards,
            SP,
            [(i, (i + parts) % shard.count) for i in range(shard.count)],
        )
        order = "plain" if pieces == 1 else "zigzag"
        out, _ = ring_attention(group_queries, Keys(k, v, places), ring, order, kernels)
        out = out.astype(x.q.dtype).reshape(batch, pieces, parts, rows // pieces, own, dim)
        out = jnp.swapaxes(out, 1, 2).reshape(batch, parts, rows, own, dim)
        if parts > 1:
            out = jax.lax.all_to_all(out, SP, 1, 2, axis_index_groups=index_groups)
        else:
            out = jnp.moveaxis(out, 1, 2)
        return out.reshape(batch, rows, heads, dim), (keys.k, keys.v)

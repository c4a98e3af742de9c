"""Ring attention: KV travels around the shards, each step's transfer beside the attention of the step before.

Plain and zigzag order after zhuzilin/ring-flash-attention (ring attention: arXiv 2310.01889). In zigzag order shard r
holds the chunks r and 2N-1-r of the document, so that causal attention is the same work on every shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, Queries, attend, keys_of, project, rows_of
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.merge import merge_partials
from apb_jax.attention.method import AttentionMethod, Capabilities
from apb_jax.errors import UserError
from apb_jax.mesh import SP
from pallas_kernels.flash_attention import RowSegment

ORDERS = ("zigzag", "plain")
Partial = tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]


def ring_order(shards: int, order: str) -> np.ndarray:
    """Chunks that every member of the ring holds, int [N, 1] (plain) or [N, 2] (zigzag)."""
    first = np.arange(shards)
    return first[:, None] if order == "plain" else np.stack([first, 2 * shards - 1 - first], axis=1)


@dataclass(frozen=True)
class RingAxis:
    """A ring over a mesh axis: this member's index in it, its size, and who sends to whom."""

    index: Int[Array, ""]
    size: int
    axis: str
    route: Sequence[tuple[int, int]]

    def shift(self, keys: Keys) -> Keys:
        """The keys that the member before holds: one ``ppermute`` (K and V together), two under STRING."""
        kv = jax.lax.ppermute(jnp.stack([keys.k, keys.v]), self.axis, self.route)
        places = None if keys.positions is None else jax.lax.ppermute(keys.positions, self.axis, self.route)
        return Keys(kv[0], kv[1], places)


def ring_attention(queries: Queries, keys: Keys, ring: RingAxis, order: str, kernels: Kernels) -> Partial:
    """Causal attention over the keys of all members, chunks placed as ``ring_order`` says; size - 1 shifts."""
    rows = queries.rows
    step = _plain_step if order == "plain" else _zigzag_step
    travelling = ring.shift(keys) if ring.size > 1 else keys
    total = attend(queries, (keys,), (RowSegment(rows, start=0, offset=0, end=rows),), kernels)
    for number in range(1, ring.size):
        # Started before this step's attention, needed after it: the transfer hides behind the products.
        following = ring.shift(travelling) if number + 1 < ring.size else travelling
        total = step(queries, travelling, total, number <= ring.index, kernels)
        travelling = following
    return total


def _plain_step(queries: Queries, keys: Keys, total: Partial, earlier: Array, kernels: Kernels) -> Partial:
    """Merge the attention over a whole other block: all of it where that block is ``earlier``, else nothing."""
    rows = queries.rows
    segment = RowSegment(rows, start=0, offset=rows, end=jnp.where(earlier, rows, 0))
    return merge_partials([total, attend(queries, (keys,), (segment,), kernels)])


def _zigzag_step(queries: Queries, keys: Keys, total: Partial, earlier: Array, kernels: Kernels) -> Partial:
    """Merge two half-by-half products without masks, the same work on every shard.

    The later half always sees the received first half. If the sender comes ``earlier`` in the ring, the first half sees
    it too; otherwise the later half sees the received second half. Both products run as one call of twice the batch.
    """
    half = queries.rows // 2
    parts = [rows_of(queries, 0, half), rows_of(queries, half, 2 * half)]
    first, second = keys_of(keys, 0, half), keys_of(keys, half, 2 * half)

    def choose(yes: Array, no: Array) -> Array:
        return jnp.where(earlier, yes, no)

    def stack(a: Array, b: Array) -> Array:
        return jnp.concatenate([a, b], axis=0)

    q = jax.tree.map(stack, parts[1], jax.tree.map(choose, parts[0], parts[1]))
    kv = jax.tree.map(stack, first, jax.tree.map(choose, first, second))
    out, lse = attend(q, (kv,), (RowSegment(half, start=0, offset=half, end=half),), kernels)
    batch = queries.near.shape[0]
    chosen = out[batch:], lse[batch:]
    nothing = jnp.full_like(chosen[1], -jnp.inf)
    head = merge_partials([(total[0][:, :half], total[1][..., :half]), (chosen[0], choose(chosen[1], nothing))])
    tail = merge_partials(
        [
            (total[0][:, half:], total[1][..., half:]),
            (out[:batch], lse[:batch]),
            (chosen[0], choose(nothing, chosen[1])),
        ]
    )
    return jnp.concatenate([head[0], tail[0]], axis=1), jnp.concatenate([head[1], tail[1]], axis=2)


@dataclass(frozen=True)
class Ring(AttentionMethod):
    """Exact attention with KV on the move. ``order``: "zigzag" (balanced) or "plain" (contiguous blocks)."""

    order: str = "zigzag"

    name: ClassVar[str] = "ring"
    can: ClassVar[Capabilities] = Capabilities(
        exact=True, paper="Ring Attention, arXiv 2310.01889", tested=("exact limit", "shards agree")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise UserError(f"ring order {self.order!r} is unknown; choose one of {', '.join(ORDERS)}")

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        return chunk_layout(prompts, ring_order(shards, self.order))

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, keys = project(x)
        route = [(i, (i + 1) % shard.count) for i in range(shard.count)]
        ring = RingAxis(shard.index, shard.count, SP, route)
        out, _ = ring_attention(queries, keys, ring, self.order, kernels)
        return out.astype(x.q.dtype), (keys.k, keys.v)

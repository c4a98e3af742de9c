"""Attention of query and generated tokens over the sharded cache: exact for every method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import project
from apb_jax.attention.inputs import Cached, CachedLayer, LayerInputs, Shard
from apb_jax.attention.merge import merge_partials, merge_shards
from apb_jax.attention.placement import Placement
from apb_jax.attention.remapped import Border, Interval, remapped_attention
from pallas_kernels.decode_attention import Parts, decode_parts


def attend_shard(
    q: Float[Array, "B M H D"],
    document: CachedLayer,
    kept_tokens: Int[Array, " B"],
    tail: CachedLayer,
    tail_offset: Int[Array, " B"],
    shard: Shard,
    *,
    query_tokens: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B M H D"], Float[Array, "B H M"]]:
    """This shard's part, before merging: its cached tokens and, on the last shard, the tail (query and answer so far).

    Row i sees tail slots j <= i + tail_offset. ``query_tokens`` switches on the originals' quirk: on the other shards a
    bottom-right causal mask hides the last m - 1 - i cached tokens from query row i (thunlp/APB's code, not its paper).
    """
    owner = shard.index == shard.count - 1
    offset = None
    if query_tokens is not None:
        offset = jnp.where(owner, document.k.shape[2], kept_tokens - query_tokens)  # all rows: hides nothing
    local = decode_parts(q, *document.stacks(), kept_tokens, offset, layer=document.layer)
    return Parts.beside([local, _tail_parts(q, tail, tail_offset, owner if shard.count > 1 else None)]).merged()


def _tail_parts(
    q: Float[Array, "B M H D"], tail: CachedLayer, tail_offset: Int[Array, " B"], counted: Array | None
) -> Parts:
    """Attention over query and answer so far; ``counted``: a bool that empties it where it is False (None: True)."""
    slots = jnp.full_like(tail_offset, tail.k.shape[2])
    rows = slots if counted is None else jnp.where(counted, slots, 0)
    return decode_parts(q, *tail.stacks(), rows, tail_offset, layer=tail.layer)


def decode_sharded(
    q: Float[Array, "B M H D"],
    document: CachedLayer,
    kept_tokens: Int[Array, " B"],
    tail: CachedLayer,
    tail_offset: Int[Array, " B"],
    shard: Shard,
    *,
    query_tokens: Int[Array, " B"] | None = None,
) -> Float[Array, "B M H D"]:
    """Exact attention over all shards' caches and the tail; one ``pmax`` and one ``psum`` (see ``merge_shards``)."""
    out, lse = attend_shard(q, document, kept_tokens, tail, tail_offset, shard, query_tokens=query_tokens)
    return merge_shards(out, lse, shard.placement).astype(q.dtype)


def decode_on_device(
    q: Float[Array, "B M H D"],
    document: CachedLayer,
    kept_tokens: Int[Array, "B V"],
    tail: CachedLayer,
    tail_offset: Int[Array, " B"],
    query_tokens: Int[Array, " B"] | None,
    placement: Placement,
) -> Float[Array, "B M H D"]:
    """``decode_sharded`` for all V shards of this device at once: they stand in the kernel's batch, nothing is moved.

    The cache is read where it lies; its rows [V * C] of a request are V requests of C rows.
    """
    count, batch = placement.local, q.shape[0]
    fold = lambda a: a.reshape(a.shape[0], batch * count, -1, *a.shape[3:])  # noqa: E731
    last = placement.on_device() == placement.shards - 1
    offset = None
    if query_tokens is not None:
        offset = jnp.where(last, document.k.shape[2], kept_tokens - query_tokens[:, None]).reshape(-1)
    many = jnp.repeat(q, count, axis=0)
    k, v = jax.tree.map(fold, document.stacks())
    local = decode_parts(many, k, v, kept_tokens.reshape(-1), offset, layer=document.layer).of_batch(count)
    counted = None if placement.devices == 1 else jnp.any(last)
    own = Parts.beside([local, _tail_parts(q, tail, tail_offset, counted)]).merged()
    return merge_shards(*own, Placement(placement.devices)).astype(q.dtype)


def attend_remapped(
    x: LayerInputs, cached: Cached, shard: Shard
) -> tuple[Float[Array, "B M H D"], Float[Array, "B H M"]]:
    """``attend_shard`` under STRING."""
    queries, _ = project(x)
    assert queries.rope is not None
    assert queries.far is not None
    assert queries.positions is not None
    rope, far, query_positions = queries.rope, queries.far, queries.positions
    rows, row = x.q.shape[1], jnp.arange(x.q.shape[1], dtype=jnp.int32)[None]
    # The released code treats the query as part of its prefill, where the border counts twice; a step it does not.
    border = Border(rope.offset, rope.border_twice and rows > 1)
    owner = shard.index == shard.count - 1

    def part(
        kv: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]],
        places: Int[Array, "B T"],
        stop: Int[Array, "B M"],
    ) -> tuple[Float[Array, "B M H D"], Float[Array, "B H M"]]:
        positions = jnp.broadcast_to(places[..., None], kv[0].shape[:3])
        seen = Interval(jnp.zeros_like(stop), stop)
        return remapped_attention(queries.near, far, *kv, query_positions, positions, seen, border)

    stop = jnp.broadcast_to(cached.kept_tokens[:, None], queries.positions.shape)
    if cached.query_tokens is not None:
        hidden = stop + row - cached.query_tokens[:, None] + 1
        stop = jnp.where(owner, stop, jnp.minimum(stop, hidden))
    local = part(cached.document.alone(x.q.dtype), cached.kept_positions, stop)
    slots = jnp.arange(cached.tail.k.shape[2], dtype=jnp.int32)[None]
    own, places = cached.tail.alone(x.q.dtype), cached.tail_position[:, None] + slots
    new, lse = part(own, places, cached.tail_offset[:, None] + row + 1)
    return merge_partials([local, (new, jnp.where(owner, lse, -jnp.inf))])


def decode_remapped(x: LayerInputs, cached: Cached, shard: Shard) -> Float[Array, "B M H D"]:
    """``decode_sharded`` under STRING: positions are local knowledge, so the collectives are the same."""
    return merge_shards(*attend_remapped(x, cached, shard), shard.placement).astype(x.q.dtype)

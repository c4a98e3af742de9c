"""APB's anchor computed once: every shard holds 1 / N of its rows, keys and values are gathered with the selections.

Same mathematics as an anchor on every shard: its rows see only each other. At 128K tokens on 8 shards with an anchor of
a quarter of a block, a shard has 16,896 rows instead of 20,480.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apb_jax.attention.inputs import Shard
from apb_jax.attention.layout import Layout


def share_anchor(blocks: Layout, anchor: np.ndarray) -> Layout:
    """``blocks`` with shard r's part of the anchor's tokens (int32 [B, A], positions 0..A-1) in front."""
    batch, shards, _ = blocks.tokens.shape
    part = -(-anchor.shape[1] // shards)
    tokens = np.zeros((batch, shards * part), np.int32)
    tokens[:, : anchor.shape[1]] = anchor
    places = np.broadcast_to(np.arange(shards * part, dtype=np.int32), tokens.shape)
    return replace(
        blocks,
        segments=(("anchor", part), *blocks.segments),
        tokens=np.concatenate([tokens.reshape(batch, shards, part), blocks.tokens], axis=2),
        positions=np.concatenate([places.reshape(batch, shards, part), blocks.positions], axis=2),
    )


def anchor_edge(rows: Float[Array, "B R F"], anchor: int, count: int, shard: Shard) -> Float[Array, "B c F"]:
    """The anchor's last ``count`` rows on every shard, from each shard's part ``rows``; one small ``psum``."""
    wanted = jnp.arange(anchor - count, anchor, dtype=jnp.int32) - shard.index * rows.shape[1]
    mine = (wanted >= 0) & (wanted < rows.shape[1])
    found = jnp.take(rows, jnp.clip(wanted, 0, rows.shape[1] - 1), axis=1)
    return shard.placement.psum(jnp.where(mine[None, :, None], found, jnp.zeros_like(found)))


def gather_with_anchor(
    part: Float[Array, "B R K E"], selected: Float[Array, "B P K E"], anchor: int, shard: Shard
) -> tuple[Float[Array, "B A K E"], Float[Array, "B NP K E"]]:
    """The whole anchor and all shards' selections, in shard order, by one ``all_gather``."""
    rows = part.shape[1]
    everything = shard.placement.all_gather(jnp.concatenate([part, selected], axis=1), axis=1)  # [B, N, R+P, K, E]
    whole, chosen = everything[:, :, :rows], everything[:, :, rows:]
    flat = lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])  # noqa: E731
    return flat(whole)[:, :anchor], flat(chosen)

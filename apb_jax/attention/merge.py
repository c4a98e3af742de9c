"""Partial attentions and their exact merge by log-sum-exp, locally and over the sequence axis."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from apb_jax.attention.placement import Placement


def merge_partials(
    parts: Sequence[tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]],
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """Merge attentions over disjoint key sets: (out, lse_nat) of their union, both float32.

    A row that sees nothing anywhere gives out = 0 and lse = -inf.
    """
    lses = jnp.stack([lse for _, lse in parts])
    top = jnp.max(lses, axis=0)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(lses - safe)
    total = jnp.sum(weights, axis=0)
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
    scaled = jnp.sum(outs * jnp.swapaxes(weights, 2, 3)[..., None], axis=0)
    divisor = jnp.swapaxes(jnp.where(total == 0, 1.0, total), 1, 2)[..., None]
    return scaled / divisor, jnp.where(total == 0, -jnp.inf, safe + jnp.log(jnp.where(total == 0, 1.0, total)))


def merge_shards(
    out: Float[Array, "B S H D"], lse: Float[Array, "B H S"], placement: Placement
) -> Float[Array, "B S H D"]:
    """Merge every shard's partial attention; float32, the same on all shards.

    Collectives, unless the shard is the only one: one ``pmax`` of [B, H, S] and one ``psum`` of [B, S, H, D + 1]
    (numerator and denominator together).
    """
    if placement.shards == 1:
        return out
    top = placement.pmax(lse)
    weight = jnp.swapaxes(jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top)), 1, 2)[..., None]
    both = jnp.concatenate([out.astype(jnp.float32) * weight, weight], axis=-1)
    both = placement.psum(both)
    return both[..., :-1] / jnp.where(both[..., -1:] == 0, 1.0, both[..., -1:])

"""Which row of a cache holds which token: from shards with padding to document order, and back for other shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout, block_layout, bucket

if TYPE_CHECKING:
    from apb_jax.attention.placement import Placement


def rows_in_order(layout: Layout, placement: Placement) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every request (rows of the cache, their positions), int32 [kept] each, in document order.

    Shards stand where ``placement`` puts them; rows of equal position stay in the order of their shards.
    """
    capacity, places, found = layout.kept_capacity, placement.places, []
    for kept, positions in zip(layout.kept_tokens, layout.kept_positions, strict=True):
        rows = np.concatenate([places[n] * capacity + np.arange(count) for n, count in enumerate(kept)])
        at = np.concatenate([positions[n, :count] for n, count in enumerate(kept)])
        order = np.argsort(at, kind="stable")
        found.append((rows[order].astype(np.int32), at[order].astype(np.int32)))
    return found


def even_layout(prompts: Sequence[Prompt], positions: Sequence[np.ndarray], tail: np.ndarray, shards: int) -> Layout:
    """Kept rows in document order divided evenly: right for the common decode rule, which is exact over what is kept.

    Args:
        positions: int32 [kept] of every request.
        tail: int32 [B], the position of the first query token.
    """
    share = [max(1, -(-len(at) // shards)) for at in positions]
    capacity = bucket(max(share))
    kept = np.zeros((len(prompts), shards), np.int32)
    places = np.zeros((len(prompts), shards, capacity), np.int32)
    for b, (at, rows) in enumerate(zip(positions, share, strict=True)):
        for n in range(shards):
            part = at[n * rows : (n + 1) * rows]
            kept[b, n] = len(part)
            places[b, n, : len(part)] = part
    return replace(block_layout(prompts, shards), kept_tokens=kept, kept_positions=places, tail_position=tail)

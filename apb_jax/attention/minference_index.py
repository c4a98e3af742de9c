"""MInference's index construction: from the last queries' attention to windows and columns per query tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import KeyTiles

TILE = 64
LAST_ROWS = 64
FORCED_COLUMNS = 30
FORCED_DISTANCES = 100
LEAST_VERTICAL, LEAST_SLASH = 30, 50


def estimate(
    q: Float[Array, "S D"], k: Float[Array, "S D"], rows: Int[Array, ""]
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """Attention mass of one head's last rows before ``rows``, by column and by distance; float32, forced ones inf."""
    keys, dim = k.shape
    index = rows - LAST_ROWS + jnp.arange(LAST_ROWS, dtype=jnp.int32)
    last = q[jnp.maximum(index, 0)]
    precision = "highest" if q.dtype == jnp.float32 else None
    logits = jnp.matmul(last, k.T, precision=precision, preferred_element_type=jnp.float32) * jnp.float32(dim**-0.5)
    key = jnp.arange(keys, dtype=jnp.int32)
    visible = key <= index[:, None]
    a = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1)
    a = jnp.where((index >= 0)[:, None], a, 0.0)  # a prompt shorter than the rows asked
    source = index[:, None] - key  # the key at distance d of each row
    by_distance = jnp.take_along_axis(a, jnp.maximum(source, 0), axis=1)
    slash = jnp.where(source >= 0, by_distance, 0.0).sum(axis=0)
    vertical = jnp.where(key < FORCED_COLUMNS, jnp.inf, a.sum(axis=0))
    slash = jnp.where(key < FORCED_DISTANCES, jnp.inf, slash)
    exists = key < rows
    return jnp.where(exists, vertical, -jnp.inf), jnp.where(exists, slash, -jnp.inf)


def _windows(
    distances: Int[Array, " n"], end: Int[Array, ""], slots: int
) -> tuple[Int[Array, " slots"], Int[Array, ""]]:
    """Starts, ascending, of the disjoint windows of TILE keys for the rows before ``end``; and how many.

    ``slots``: as many as there are distances are enough.

    ``distances`` descend; those of ``end`` or more are unused. A window more than TILE behind the last range opens a
    new range, one that reaches beyond it extends it by a whole TILE: so every step adds one window or none.
    """

    def step(state: tuple[Array, Array, Array], distance: Array) -> tuple[tuple[Array, Array, Array], None]:
        starts, count, reach = state
        stop = jnp.maximum(end - distance, TILE)
        used = distance < end
        opens = used & ((count == 0) | (stop > reach + TILE))
        grows = used & ~opens & (stop > reach)
        start = jnp.where(opens, stop - TILE, reach)
        adds = opens | grows
        starts = starts.at[jnp.where(adds, count, slots)].set(start, mode="drop")
        reach = jnp.where(opens, stop, jnp.where(grows, reach + TILE, reach))
        return (starts, count + adds.astype(jnp.int32), reach), None

    empty = (jnp.full((slots,), jnp.iinfo(jnp.int32).max, jnp.int32), jnp.int32(0), jnp.int32(0))
    (starts, count, _), _ = jax.lax.scan(step, empty, distances)
    return starts, count


def slots_for(tiles: int, slashes: int) -> int:
    """Windows that a tile can need: every distance adds one at most, and so many fill the prompt."""
    return min(tiles + 1, slashes)


def vertical_slash_tiles(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    rows: Int[Array, " B"],
    vertical: Int[Array, " H"],
    slash: Int[Array, " H"],
    most_vertical: int,
    most_slash: int,
) -> KeyTiles:
    """Windows around the chosen slashes and the chosen columns outside them; S a multiple of TILE.

    A tile has ``slots_for(tiles, most_slash)`` windows at most.

    ``rows``: rows that exist. ``vertical`` and ``slash``: how many lines each head takes, at most the static maxima.
    """
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    tiles = length // TILE
    v_max = min(length, max(most_vertical, LEAST_VERTICAL))
    s_max = min(length, max(most_slash, LEAST_SLASH))
    slots = slots_for(tiles, s_max)
    ends = (jnp.arange(tiles, dtype=jnp.int32) + 1) * TILE

    def lines(place: tuple[Array, Array]) -> tuple[Array, Array]:
        """One head's columns, ascending, and distances, descending; unused ones are beyond every key."""
        b, h = place
        by_column, by_distance = estimate(q[b, :, h], k[b, :, h // group], rows[b])

        def top(scores: Array, wanted: Array, least: int, most: int) -> Array:
            count = jnp.minimum(jnp.maximum(wanted, least), rows[b])
            index = jax.lax.top_k(scores, most)[1].astype(jnp.int32)
            return jnp.sort(jnp.where(jnp.arange(most) < count, index, length))

        return top(by_column, vertical[h], LEAST_VERTICAL, v_max), top(by_distance, slash[h], LEAST_SLASH, s_max)[::-1]

    def tile(columns: Array, distances: Array, end: Array) -> tuple[Array, ...]:
        """Windows and the columns outside them for the rows before ``end``."""
        starts, count = _windows(distances, end, slots)
        before = jnp.searchsorted(starts, columns, side="right") - 1
        covered = (before >= 0) & (columns < starts[jnp.maximum(before, 0)] + TILE)
        kept = (columns < end) & ~covered
        order = jnp.argsort(~kept, stable=True)
        starts = jnp.where(jnp.arange(slots) < count, starts, 0)
        return starts, count, columns[order], kept.sum(dtype=jnp.int32)

    places = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in (batch, heads)), indexing="ij")
    # Head by head where memory grows with the prompt, all heads at once where the steps are many and small.
    columns, distances = jax.lax.map(lines, tuple(p.reshape(-1) for p in places))
    found = jax.vmap(jax.vmap(tile, (None, None, 0)), (0, 0, None))(columns, distances, ends)
    return KeyTiles(*(a.reshape(batch, heads, *a.shape[1:]) for a in found))


def block_sparse_tiles(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], rows: Int[Array, " B"], top_k: int
) -> KeyTiles:
    """The ``top_k`` key blocks of TILE per query block by the dot product of their means; no columns.

    Means run over whole blocks, missing rows as zeros; at most one block in TILE rows of the prompt is taken.
    """
    batch, length, heads, dim = q.shape
    tiles = length // TILE
    exists = (jnp.arange(length, dtype=jnp.int32) < rows[:, None])[..., None, None]

    def means(x: Array) -> Array:
        x = jnp.where(exists, x.astype(jnp.float32), 0.0)
        return x.reshape(batch, tiles, TILE, x.shape[2], dim).mean(axis=2)

    grouped = means(q).reshape(batch, tiles, k.shape[2], -1, dim)
    scores = jnp.einsum("bikgd,bjkd->bkgij", grouped, means(k), precision="highest").reshape(batch, heads, tiles, tiles)
    own = jnp.arange(tiles, dtype=jnp.int32)
    scores = jnp.where(own[None, :] <= own[:, None], scores, -jnp.inf)
    width = min(top_k, tiles)
    index = jax.lax.top_k(scores, width)[1].astype(jnp.int32)
    limit = jnp.minimum(jnp.minimum(rows // TILE, top_k)[:, None, None], own + 1)
    limit = jnp.broadcast_to(limit, (batch, heads, tiles))
    index = jnp.sort(jnp.where(jnp.arange(width) < limit[..., None], index, tiles), axis=-1)
    starts = jnp.where(index == tiles, 0, index) * TILE
    return KeyTiles(starts, limit)

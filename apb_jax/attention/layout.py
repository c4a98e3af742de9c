"""Which token and position every local row of every shard holds: plain numpy, printable as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from apb_jax.attention.inputs import Prompt


@dataclass(frozen=True)
class Layout:
    """Which token and position every local row of every shard holds; plain numpy, one array row per request.

    Rows of a shard are its segments one after the other; the last segment is the block, whose KV is kept.
    """

    segments: tuple[tuple[str, int], ...]
    tokens: np.ndarray = field(repr=False)  # int32 [B, N, S]
    positions: np.ndarray = field(repr=False)  # int32 [B, N, S]
    block_rows: np.ndarray  # int32 [B]: rows of a block that exist (padding of the last shard included)
    document_tokens: np.ndarray  # int32 [B]
    embedded_query_tokens: np.ndarray  # int32 [B]
    kept_tokens: np.ndarray = None  # type: ignore[assignment]
    """int32 [B, N]: KV rows each shard keeps, a prefix of its cache. Default: contiguous blocks without padding."""
    kept_positions: np.ndarray = field(default=None, repr=False)  # type: ignore[arg-type]
    """int32 [B, N, C]: the position of every cache row. Default: the block's."""
    tail_position: np.ndarray = None  # type: ignore[assignment]
    """int32 [B]: position of the first query token. Default: right behind the document."""

    def __post_init__(self) -> None:
        if self.kept_tokens is None:
            start = np.arange(self.shards)[None] * self.block_rows[:, None]
            kept = np.clip(self.document_tokens[:, None] - start, 0, self.block_rows[:, None]).astype(np.int32)
            object.__setattr__(self, "kept_tokens", kept)
        if self.kept_positions is None:
            object.__setattr__(self, "kept_positions", self.positions[:, :, -self.block_capacity :])
        if self.tail_position is None:
            object.__setattr__(self, "tail_position", self.document_tokens)
        rows = sum(n for _, n in self.segments)
        if self.tokens.shape != self.positions.shape or self.tokens.shape[2] != rows:
            raise ValueError(f"layout arrays {self.tokens.shape} do not fit segments of {rows} rows")
        if (self.block_rows > self.block_capacity).any() or (self.block_rows < 1).any():
            raise ValueError(f"block rows {self.block_rows} outside 1..{self.block_capacity}")

    @property
    def shards(self) -> int:
        return self.tokens.shape[1]

    @property
    def block_capacity(self) -> int:
        """Static rows of the block segment: at least every request's ``block_rows``."""
        return self.segments[-1][1]

    @property
    def kept_capacity(self) -> int:
        """Static rows of each shard's cache."""
        return self.kept_positions.shape[2]


LEAST = 32
"""The fewest rows that programs are compiled for, and what all such numbers of rows are multiples of."""


def granules() -> Iterator[int]:
    """The numbers of rows that programs are compiled for, ascending: three an octave (1, 1.25 and 1.5 times)."""
    power, last = LEAST, 0
    while True:
        for eighths in (8, 10, 12):
            size = power * eighths // (8 * LEAST) * LEAST
            if size > last:
                yield size
            last = max(last, size)
        power *= 2


def bucket(rows: int) -> int:
    """Rows rounded up to a number that programs are compiled for.

    Documents within a factor of two need at most four programs; the price is padding, at most a third, 13% on average
    and none of 128K, 160K and 192K tokens.
    """
    return next(size for size in granules() if size >= rows)


def surely(rows: int) -> int:
    """Rows that every number of the same ``bucket`` has: budgets derived from it do not vary inside one."""
    whole = bucket(rows)
    return max(itertools.takewhile(lambda size: size < whole, granules()), default=0) + 1


def block_layout(
    prompts: Sequence[Prompt], shards: int, *, prefix: tuple[tuple[str, np.ndarray, np.ndarray], ...] = ()
) -> Layout:
    """Contiguous blocks of ceil(n / shards) tokens, padded with token 0 at position 0 (thunlp/APB's padding).

    ``prefix``: segments before the block, (name, tokens [B, rows], positions [rows]), the same on every shard.
    """
    block_rows = np.asarray([-(-len(p.document) // shards) for p in prompts], np.int32)
    capacity = bucket(int(block_rows.max()))
    shape = (len(prompts), shards, capacity)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b, prompt in enumerate(prompts):
        for r in range(shards):
            start = r * int(block_rows[b])
            part = prompt.document[start : start + block_rows[b]]
            tokens[b, r, : len(part)] = part
            positions[b, r, : len(part)] = np.arange(start, start + len(part))
    for _, ids, place in reversed(prefix):
        rows = np.broadcast_to(ids[:, None], (len(prompts), shards, ids.shape[1]))
        tokens = np.concatenate([rows, tokens], axis=2)
        positions = np.concatenate([np.broadcast_to(place, rows.shape), positions], axis=2)
    return Layout(
        segments=(*((name, ids.shape[1]) for name, ids, _ in prefix), ("block", capacity)),
        tokens=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        block_rows=block_rows,
        document_tokens=np.asarray([len(p.document) for p in prompts], np.int32),
        embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
    )


def chunk_layout(prompts: Sequence[Prompt], order: np.ndarray, multiple: int = 1) -> Layout:
    """Equal chunks of whole programs' length: shard r holds the chunks ``order[r]`` (ascending), int [N, pieces].

    A chunk has a bucketed number of rows (a multiple of ``multiple``), so padding stands behind the document only and
    row i of chunk c is token c * rows + i: exact methods need no other bookkeeping.
    """
    longest = max(len(p.document) for p in prompts)
    rows = bucket(-(-longest // order.size))
    rows = -(-rows // multiple) * multiple
    index = (order[:, :, None] * rows + np.arange(rows)).reshape(order.shape[0], -1).astype(np.int32)
    lengths = np.asarray([len(p.document) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), order.size * rows), np.int32)
    for b, prompt in enumerate(prompts):
        padded[b, : len(prompt.document)] = prompt.document
    return Layout(
        segments=(("block", index.shape[1]),),
        tokens=padded[:, index],
        positions=np.broadcast_to(index, (len(prompts), *index.shape)),
        block_rows=np.full(len(prompts), index.shape[1], np.int32),
        document_tokens=lengths,
        embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
        kept_tokens=(index[None] < lengths[:, None, None]).sum(axis=2).astype(np.int32),
    )

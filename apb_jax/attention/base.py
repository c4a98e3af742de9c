"""The seam: what an attention method is, what it may say about itself, and what it gets to work with.

A method differs from full attention in which tokens each shard holds (``layout``), what is exchanged and which keys
each row sees (``prefill``), and which KV is kept. Decoding is the same for nearly all: a partial attention per shard
and one merge; a method with its own rule overrides ``decode``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.decode import Cached, decode_remapped, decode_sharded
from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import LayerInputs
from apb_jax.model.string_rope import StringRope

KeptKV = tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]


@dataclass(frozen=True)
class Capabilities:
    """What a method can do: read by the engine (to refuse early), the tests (what to skip) and the README table."""

    exact: bool
    paper: str
    needs_scorer: bool = False
    """Ranks keys by retaining heads, or by the query where there are none."""
    needs_heads: bool = False
    """Works with trained retaining heads only."""
    needs_query_in_prefill: bool = False
    max_shards: int | None = None
    max_batch: int | None = None
    remaps_positions: bool = True
    """Whether ``--rope string`` composes with it."""
    true_positions: bool = True
    """Whether prefill scores keys at their true distances, so that its softmax compares with full attention's."""
    selects: bool = False
    """Whether rows see only a selection of what stands in front of them in their own block."""
    tested: tuple[str, ...] = ("exact limit",)
    """Kinds of evidence in tests/: "exact limit", "selection oracle", "recordings", "transformers"."""


@dataclass(frozen=True)
class Kernels:
    """Which implementations the ops of ``pallas_kernels`` use; None lets each op choose."""

    attention: str | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids of one request: document, full query, and the clean query that may be embedded in an anchor."""

    document: np.ndarray
    query: np.ndarray
    embedded_query: np.ndarray


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shard:
    """A shard's place inside ``shard_map``: its index on the sequence axis and the lengths of the requests."""

    index: Int[Array, ""]
    block_rows: Int[Array, " B"]
    document_tokens: Int[Array, " B"]
    embedded_query_tokens: Int[Array, " B"]
    query_tokens: Int[Array, " B"]
    count: int = field(metadata={"static": True})
    axis: str = field(metadata={"static": True})
    segments: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})
    """Those of the layout, in prefill."""


def bucket(rows: int) -> int:
    """Rows rounded up to a length that programs are compiled for: at most 1/8 is padding above 256 rows."""
    step = max(32, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def block_layout(
    prompts: list[Prompt], shards: int, *, prefix: tuple[tuple[str, np.ndarray, np.ndarray], ...] = ()
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


def chunk_layout(prompts: list[Prompt], order: np.ndarray, multiple: int = 1) -> Layout:
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


@dataclass(frozen=True)
class AttentionMethod(abc.ABC):
    """One way to prefill a long document; the fields of a subclass are the hyper-parameters of its paper."""

    name: ClassVar[str]
    can: ClassVar[Capabilities]

    @classmethod
    def refuse(
        cls,
        config: ModelConfig,
        shards: int,
        batch: int,
        tp: int = 1,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """Why this method cannot serve such a model, mesh or batch at all, with the nearest legal choice; else None.

        Known before any weight is read; what depends on the documents is ``why_not``. ``options``: the fields given.
        """
        can = cls.can
        if can.max_shards is not None and shards > can.max_shards:
            return f"method {cls.name!r} runs on one shard, here are {shards}; nearest legal choice: --sp 1"
        if can.max_batch is not None and batch > can.max_batch:
            return f"method {cls.name!r} takes {can.max_batch} request at a time, not {batch}; send them one by one"
        if not can.remaps_positions and config.rope.kind == "string":
            return (
                f"method {cls.name!r} does not compose with --rope string; "
                "nearest legal choice: the model's own rope, or --method full"
            )
        return None

    def dense_layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        """Layers whose prefill is full attention by the method's settings; all where the method is exact."""
        return tuple(range(config.num_layers)) if self.can.exact else ()

    def why_not(self, prompts: list[Prompt], shards: int) -> str | None:
        """Why these prompts do not fit this method on so many shards, with the numbers; None where they do."""
        return None

    @abc.abstractmethod
    def layout(self, prompts: list[Prompt], shards: int) -> Layout:
        """The rows of every shard."""

    @abc.abstractmethod
    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        """One layer's attention over the local rows and the KV of the block, inside ``shard_map``."""

    def decode(self, x: LayerInputs, cached: Cached, shard: Shard) -> Float[Array, "B M H D"]:
        """One layer's attention of query or generated rows over what was kept; exact by default."""
        if isinstance(x.rope, StringRope):
            return decode_remapped(x, cached, shard)
        return decode_sharded(
            x.rotated()[0],
            cached.document,
            cached.kept_tokens,
            cached.tail,
            cached.tail_offset,
            shard,
            query_tokens=cached.query_tokens,
        )

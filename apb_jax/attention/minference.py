"""MInference: sparse patterns per head, indices estimated from the prompt (arXiv 2407.02490; microsoft/MInference)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, Queries
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, bucket
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.minference_index import (
    LEAST_SLASH,
    LEAST_VERTICAL,
    TILE,
    block_sparse_tiles,
    vertical_slash_tiles,
)
from apb_jax.attention.streaming import a_shape
from apb_jax.errors import UserError
from apb_jax.json_text import parse_json
from apb_jax.model.config import ModelConfig
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention
from pallas_kernels.flash_attention import RowSegment, flash_attention

TYPES = ("vertical_and_slash", "block_sparse", "stream_llm")
MISSING_HEAD = ("vertical_and_slash", 1000, 6096)


@dataclass(frozen=True)
class Patterns:
    """Type (index into TYPES), vertical and slash size of every head; int32 [L, H]."""

    types: np.ndarray
    vertical: np.ndarray
    slash: np.ndarray


@functools.cache
def read_patterns(path: str, heads: int) -> Patterns:
    """A pattern file in MInference's JSON format: per layer {"head": [type, vertical, slash, score]}."""
    try:
        layers = parse_json(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"pattern file {path} cannot be read: {error}") from error
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise UserError(f"pattern file {path} must be a list with one object per layer")
    rows: list[list[tuple[int, int, int]]] = []
    for number, layer in enumerate(layers):
        row = []
        for head in range(heads):
            kind, vertical, slash = (*layer.get(str(head), MISSING_HEAD),)[:3]
            if kind not in TYPES:
                raise UserError(f"pattern file {path}: layer {number} head {head} has type {kind!r}; known: {TYPES}")
            row.append((TYPES.index(kind), int(vertical), int(slash)))
        extra = [h for h in layer if int(h) >= heads]
        if extra:
            raise UserError(f"pattern file {path}: layer {number} has head {extra[0]}, the model has {heads} heads")
        rows.append(row)
    table = np.asarray(rows, np.int32)
    return Patterns(table[..., 0], table[..., 1], table[..., 2])


@dataclass(frozen=True)
class MInference(AttentionMethod):
    """One shard; the prompt (document and query) is prefilled sparsely, decoding is dense.

    ``patterns``: a file in the original JSON format; without one every head is vertical-slash with ``vertical`` columns
    and ``slash`` diagonals. ``dense_layers``: layers from the first on that stay dense. ``ratio`` scales both sizes.
    The query's rows stand behind the document in prefill, because the last 64 rows choose the indices; the query phase
    then sees the document densely, where the original processes the query's rows sparsely too.
    """

    patterns: str | None = None
    vertical: int = 1000
    slash: int = 6096
    block_top_k: int = 100
    dense_layers: int = 0
    ratio: float = 1.0

    name: ClassVar[str] = "minference"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        selects=True,
        block_sparse=True,
        paper="MInference, arXiv 2407.02490",
        needs_query_in_prefill=True,
        max_shards=1,
        remaps_positions=False,
        tested=("exact limit", "selection oracle"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("vertical", 1), ("slash", 1), ("block_top_k", 1), ("dense_layers", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        if not self.ratio > 0:
            raise UserError(f"ratio is {self.ratio}; it must be above 0")

    @classmethod
    def refuse(cls, setup: Setup, options: Mapping[str, Any]) -> str | None:
        path, config = options.get("patterns"), setup.config
        if path is not None:
            layers = len(read_patterns(path, config.num_heads).types)
            if layers != config.num_layers:
                return f"pattern file {path} has {layers} layers, the model has {config.num_layers}; give its own file"
        return super().refuse(setup, options)

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """Llama 3.1 8B: the sizes that every head of its published pattern file has."""
        sizes = {"vertical": 512, "slash": 2048} if setup.model == "llama3.1-8b" else {}
        return cls(**{**sizes, **options})

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """Without a pattern file: every head has all columns, or all diagonals, of document and query."""
        if self.patterns is not None:
            return None
        rows, sizes = max(len(p.document) + len(p.query) for p in prompts), self.table(1, 1)
        columns = max(LEAST_VERTICAL, sizes.vertical.item())
        diagonals = max(LEAST_SLASH, sizes.slash.item())
        if columns >= rows:
            return f"{columns} columns are all keys of the document"
        return f"{diagonals} diagonals are all distances in the document" if diagonals >= rows else None

    def dense_layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(min(self.dense_layers, config.num_layers)))

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        whole = [np.concatenate([p.document, p.query]) for p in prompts]
        rows = -(-bucket(max(map(len, whole))) // TILE) * TILE
        tokens = np.zeros((len(prompts), 1, rows), np.int32)
        for b, ids in enumerate(whole):
            tokens[b, 0, : len(ids)] = ids
        documents = np.asarray([len(p.document) for p in prompts], np.int32)
        return Layout(
            segments=(("block", rows),),
            tokens=tokens,
            positions=np.broadcast_to(np.arange(rows, dtype=np.int32), tokens.shape),
            block_rows=np.asarray([len(ids) for ids in whole], np.int32),
            document_tokens=documents,
            embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
            kept_tokens=documents[:, None],
        )

    def table(self, layers: int, heads: int) -> Patterns:
        """Sizes after ``ratio``."""
        if self.patterns is not None:
            found = read_patterns(self.patterns, heads)
        else:
            shape = (layers, heads)
            found = Patterns(np.zeros(shape, np.int32), np.full(shape, self.vertical), np.full(shape, self.slash))
        scaled = (np.maximum(1, (x * self.ratio).astype(np.int32)) for x in (found.vertical, found.slash))
        return Patterns(found.types, *scaled)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        q, k = x.rotated()

        def sparse() -> Float[Array, "B S H D"]:
            return self.attend_sparse(q, k, x, shard, kernels)

        def dense() -> Float[Array, "B S H D"]:
            rows = RowSegment(q.shape[1], start=0, offset=0, end=q.shape[1])
            return flash_attention(q, (k,), (x.v,), (rows,), implementation=kernels.attention, eight=kernels.eight)[0]

        out = jax.lax.cond(x.layer < self.dense_layers, dense, sparse) if self.dense_layers else sparse()
        return out, (k, x.v)

    def attend_sparse(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], x: LayerInputs, shard: Shard, kernels: Kernels
    ) -> Float[Array, "B S H D"]:
        """Each local head by its pattern in this layer."""
        heads = q.shape[2]
        total = heads * (jax.lax.axis_size(x.tp_axis) if x.tp_axis else 1)
        table = self.table(1, total)
        layer = x.layer if self.patterns is not None else jnp.int32(0)
        first = jax.lax.axis_index(x.tp_axis) * heads if x.tp_axis else 0

        def local(a: np.ndarray) -> Array:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(a, jnp.int32)[layer], first, heads)

        types, vertical, slash = local(table.types), local(table.vertical), local(table.slash)
        with jax.named_scope("minference_index"):
            tiles = vertical_slash_tiles(
                q, k, shard.block_rows, vertical, slash, int(table.vertical.max()), int(table.slash.max())
            )
            if (table.types == TYPES.index("block_sparse")).any():
                blocks = block_sparse_tiles(q, k, shard.block_rows, self.block_top_k)
                is_block = (types == TYPES.index("block_sparse"))[None, :, None]
                width = max(blocks.starts.shape[-1], tiles.starts.shape[-1])

                def wide(starts: Array) -> Array:
                    return jnp.pad(starts, ((0, 0), (0, 0), (0, 0), (0, width - starts.shape[-1])))

                tiles = KeyTiles(
                    jnp.where(is_block[..., None], wide(blocks.starts), wide(tiles.starts)),
                    jnp.where(is_block, blocks.counts, tiles.counts),
                    tiles.columns,
                    None if tiles.column_counts is None else jnp.where(is_block, 0, tiles.column_counts),
                )
        out, _ = block_sparse_attention(q, k, x.v, tiles, blocks=Blocks(TILE, TILE))
        stream = table.types == TYPES.index("stream_llm")
        for sinks, window in sorted(set(zip(table.vertical[stream], table.slash[stream], strict=True))):
            other, _ = a_shape(Queries(q), Keys(k, x.v), int(sinks), int(window), kernels)
            mine = (types == TYPES.index("stream_llm")) & (vertical == int(sinks)) & (slash == int(window))
            out = jnp.where(mine[None, None, :, None], other.astype(out.dtype), out)
        return out

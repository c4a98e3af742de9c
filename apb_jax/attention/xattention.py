"""XAttention: key blocks chosen by anti-diagonal sums of scores (arXiv 2503.16428; mit-han-lab/x-attention)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from apb_jax.attention.attend import Keys
from apb_jax.attention.full import gather_document
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.errors import UserError
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention

BLOCK = 128
STRIDES = (4, 8, 16)
PUBLISHED = (("llama3.1-8b", 8), ("llama3.1-8b", 16))
"""Model and stride of the published thresholds."""
BLOCKS_AT_ONCE = 4
"""Query blocks whose estimates are in memory at a time."""


@functools.cache
def threshold_table(model: str, stride: int) -> np.ndarray:
    """Published thresholds, float32 [layers, query heads]; UserError where there are none."""
    text = resources.files("apb_jax.attention").joinpath("xattention_thresholds.json").read_text()
    tables = json.loads(text)
    tables.pop("source")
    if model not in tables or str(stride) not in tables[model]:
        known = ", ".join(f"{m} (stride {'/'.join(t)})" for m, t in tables.items())
        raise UserError(
            f"no XAttention thresholds for {model!r} at stride {stride}; there are: {known}; or give a number"
        )
    return np.asarray(tables[model][str(stride)], np.float32) * np.float32(1e-4)


def block_mass(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    *,
    stride: int,
    block: int,
    q_tokens: Int[Array, " B"],
    k_tokens: Int[Array, " B"],
    offset: Int[Array, ""] | int = 0,
    first_key: Int[Array, ""] | int = 0,
) -> Float[Array, "B H Iq J"]:
    """Estimated attention mass of every query block on every key block, float32.

    ``stride`` tokens make one row or column; a row's score with a column sums the anti-diagonal of their tile, and
    the softmax runs over columns. Row 0 stands ``offset`` tokens (a multiple of ``block``) behind key 0. Tokens from
    ``q_tokens`` and ``k_tokens`` on count as zeros; keys before ``first_key`` (a multiple of ``stride``) as absent.
    """
    batch, rows, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    per = block // stride

    def strided(x: Array, tokens: Array, flip: bool) -> Array:
        exists = jnp.arange(x.shape[1], dtype=jnp.int32) < tokens[:, None]
        x = jnp.where(exists[..., None, None], x, jnp.zeros_like(x))
        x = x.reshape(batch, -1, stride, x.shape[2], dim)
        x = jnp.flip(x, axis=2) if flip else x
        return jnp.swapaxes(x, 2, 3).reshape(batch, -1, x.shape[3], stride * dim)

    q, k = strided(q, q_tokens, True), strided(k, k_tokens, False)
    columns = jnp.arange(keys // stride, dtype=jnp.int32)
    real = (columns >= first_key // stride) & (columns < -(-k_tokens[:, None] // stride))  # [B, C]
    scale = jnp.float32(1.0 / (math.sqrt(dim) * stride))
    precision = "highest" if q.dtype == jnp.float32 else None
    q = q.reshape(batch, rows // block, per, kv_heads, heads // kv_heads, stride * dim)

    def one(number: Array) -> Array:
        tile = jax.lax.dynamic_index_in_dim(q, number, axis=1, keepdims=False)
        z = jnp.einsum("brkgd,bckd->bkgrc", tile, k, precision=precision, preferred_element_type=jnp.float32) * scale
        row = number * per + jnp.arange(per, dtype=jnp.int32)
        visible = (columns <= (row + offset // stride)[:, None]) & real[:, None]  # [B, r, C]
        z = jnp.where(visible[:, None, None], z, -jnp.inf)
        peak = jnp.max(z, axis=-1, keepdims=True)
        p = jnp.exp(z - jnp.where(jnp.isneginf(peak), 0.0, peak))
        total = p.sum(axis=-1, keepdims=True)
        alive = (row < -(-q_tokens[:, None] // stride))[:, None, None, :, None]
        p = jnp.where(alive, p / jnp.where(total == 0, 1.0, total), 0.0)
        return p.reshape(batch, heads, per, keys // block, per).sum(axis=(2, 4))

    blocks = jnp.arange(rows // block, dtype=jnp.int32)
    return jnp.moveaxis(jax.lax.map(one, blocks, batch_size=min(BLOCKS_AT_ONCE, rows // block)), 0, 2)


def select_blocks(
    mass: Float[Array, "B H Iq J"],
    forced: Bool[Array, "Iq J"],
    causal: Bool[Array, "Iq J"],
    threshold: Float[Array, " H"],
) -> Bool[Array, "B H Iq J"]:
    """The forced blocks and, by descending mass, as many others as it takes to reach ``threshold`` of all mass."""
    need = threshold[:, None, None] * mass.sum(axis=-1, keepdims=True)
    given = jnp.where(forced, mass, 0.0).sum(axis=-1, keepdims=True)
    others = jnp.where(forced, -1.0, mass)
    order = jnp.argsort(-others, axis=-1, stable=True)
    ranked = jnp.maximum(jnp.take_along_axis(others, order, axis=-1), 0.0)
    before = given + jnp.cumsum(ranked, axis=-1) - ranked
    kept = jnp.take_along_axis(before < need, jnp.argsort(order, axis=-1), axis=-1)
    return (kept | forced) & causal


def attend_blocks(
    q: Float[Array, "B S H D"],
    keys: Keys,
    chosen: Bool[Array, "B H Iq J"],
    block: int,
    offset: Int[Array, ""] | int,
) -> Float[Array, "B S H D"]:
    """Exact causal attention over the chosen blocks."""
    order = jnp.argsort(~chosen, axis=-1, stable=True).astype(jnp.int32)
    tiles = KeyTiles(order * block, chosen.sum(axis=-1, dtype=jnp.int32))
    return block_sparse_attention(q, keys.k, keys.v, tiles, blocks=Blocks(block, block), causal_offset=offset)[0]


@dataclass(frozen=True)
class XAttention(AttentionMethod):
    """Dense decoding; in prefill every block of queries sees the key blocks that hold ``threshold`` of its mass.

    ``threshold``: a number, or the name of a model with published thresholds per layer and head. Sharded, every shard
    estimates its own rows against the gathered keys, so the result does not depend on the number of shards.
    """

    stride: int = 8
    threshold: float | str = 0.9
    block_tokens: int = BLOCK

    name: ClassVar[str] = "xattention"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        selects=True,
        block_sparse=True,
        paper="XAttention, arXiv 2503.16428",
        remaps_positions=False,
        tested=("exact limit", "shards agree", "selection oracle"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_estimator(self.stride, self.threshold, self.block_tokens)

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """Published thresholds where the model has some for the stride, the paper's 0.9 elsewhere."""
        published = (setup.model, options.get("stride", cls.stride)) in PUBLISHED
        return cls(**{**({"threshold": setup.model} if published else {}), **options})

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if not isinstance(self.threshold, str) and self.threshold >= 1:
            return f"threshold {self.threshold} leaves out no block"
        if max(len(p.document) for p in prompts) <= 2 * self.block_tokens:
            return f"the document has two blocks of {self.block_tokens} tokens, its first and its own, always seen"
        return None

    def thresholds(self, x: LayerInputs) -> Float[Array, " H"]:
        """Of this layer's local heads."""
        heads = x.q.shape[2]
        if isinstance(self.threshold, str):
            row = jnp.asarray(threshold_table(self.threshold, self.stride))[x.layer]
            start = jax.lax.axis_index(x.tp_axis) * heads if x.tp_axis else 0
            return jax.lax.dynamic_slice_in_dim(row, start, heads)
        return jnp.full((heads,), self.threshold, jnp.float32)

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        return chunk_layout(prompts, np.arange(shards)[:, None], multiple=self.block_tokens)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        q, k = x.rotated()
        everything = gather_document(Keys(k, x.v), shard)
        rows, block = q.shape[1], self.block_tokens
        offset = shard.index * rows
        with jax.named_scope("xattention_estimate"):
            mass = block_mass(
                q,
                everything.k,
                stride=self.stride,
                block=block,
                q_tokens=jnp.clip(shard.document_tokens - offset, 0, rows),
                k_tokens=shard.document_tokens,
                offset=offset,
            )
            own = offset // block + jnp.arange(rows // block, dtype=jnp.int32)[:, None]
            column = jnp.arange(everything.tokens // block, dtype=jnp.int32)[None]
            forced = (column == 0) | (column == own)
            chosen = select_blocks(mass, forced, column <= own, self.thresholds(x))
        return attend_blocks(q, everything, chosen, block, offset), (k, x.v)


def check_estimator(stride: int, threshold: float | str, block: int) -> None:
    """UserError for settings that the estimator does not have."""
    if stride not in STRIDES:
        raise UserError(f"stride is {stride}; choose one of {', '.join(map(str, STRIDES))}")
    if isinstance(threshold, str):
        threshold_table(threshold, stride)
    elif not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}; it must lie above 0 and at most at 1 (the paper: 0.9)")
    if block < stride or block % stride:
        raise UserError(f"block_tokens is {block}; it must be a multiple of the stride {stride} (the paper: {BLOCK})")

"""Spava for text: APB without trained heads, balanced by zigzag blocks (arXiv 2601.21444; thunlp/APB).

The anchor is the document's first tokens, the rest is cut into 2N virtual blocks, two per shard. The query's rows run
beside the prefill and choose what is passed; video, its encoder and its positions have no place here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, Queries, attend
from apb_jax.attention.decode import decode_sharded
from apb_jax.attention.inputs import CachedLayer, KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, bucket, surely
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.ring import ring_order
from apb_jax.errors import UserError
from pallas_kernels.flash_attention import RowSegment
from pallas_kernels.retaining_score import RowLimits, pool_and_mask
from pallas_kernels.select import select_topk

GRANULE = 128


def default_budgets(document_tokens: int) -> tuple[int, int]:
    """(anchor, passing) tokens: 1/64 and 1/128 of the document, rounded up to whole tiles."""
    return tuple(GRANULE * -(-(document_tokens // part) // GRANULE) for part in (64, 128))  # type: ignore[return-value]


@dataclass(frozen=True)
class Spava(AttentionMethod):
    """``anchor_tokens`` shared by all blocks; ``passing_tokens`` per virtual block and KV head, chosen by the query.

    Virtual blocks are rounded up to a compiled length, so that only the document's last ones may be short.
    """

    anchor_tokens: int
    passing_tokens: int
    pool: int = 5

    name: ClassVar[str] = "spava"
    shards_alone: ClassVar[int] = 8
    can: ClassVar[Capabilities] = Capabilities(
        exact=False, paper="Spava, arXiv 2601.21444", needs_query_in_prefill=True, remaps_positions=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("anchor_tokens", "passing_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"pool is {self.pool}; it must be an odd number of rows (the paper's code: 5)")

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """The published shares of the document, shrunk to what short blocks can give."""
        shortest = surely(setup.shortest)  # so that documents of about one length share a program
        anchor, passing = default_budgets(shortest)
        anchor = min(anchor, max(1, shortest // 4))
        block = max(1, (shortest - anchor) // (2 * setup.shards))
        return cls(**{"anchor_tokens": anchor, "passing_tokens": min(passing, block), **options})

    def why_not(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        for prompt in prompts:
            behind = len(prompt.document) - self.anchor_tokens
            if behind < 2 * shards:
                return (
                    f"a document of {len(prompt.document)} tokens leaves {2 * shards} blocks nothing behind the anchor"
                )
        block = self.block_rows(prompts, shards)
        if self.passing_tokens > block:
            return f"passing {self.passing_tokens} tokens out of blocks of {block} is not possible"
        return None

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if self.passing_tokens >= self.block_rows(prompts, shards):
            return f"passing {self.passing_tokens} tokens of every block passes all of them"
        return None

    def visible_keys(self, layout: Layout, shard: int) -> dict[str, int]:
        return {"passing": shard * self.passing_tokens} | super().visible_keys(layout, shard)

    def batch_key(self, prompt: Prompt, shards: int) -> int:
        """Virtual blocks have one size in a batch."""
        return self.block_rows([prompt], shards)

    def block_rows(self, prompts: Sequence[Prompt], shards: int) -> int:
        """Tokens of a virtual block."""
        return bucket(-(-(max(len(p.document) for p in prompts) - self.anchor_tokens) // (2 * shards)))

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        anchor, block = self.anchor_tokens, self.block_rows(prompts, shards)
        share, query = -(-anchor // shards), bucket(max(len(p.query) for p in prompts))
        index = (ring_order(shards, "zigzag")[:, :, None] * block + np.arange(block)).reshape(shards, -1)
        shape = (len(prompts), shards, anchor + query + 2 * block)
        tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        places = np.zeros((len(prompts), shards, share + 2 * block), np.int32)
        kept = np.zeros(shape[:2], np.int32)
        for b, prompt in enumerate(prompts):
            n = len(prompt.document)
            rest = np.zeros(2 * shards * block, np.int32)
            rest[: n - anchor] = prompt.document[anchor:]
            tokens[b, :, :anchor], positions[b, :, :anchor] = prompt.document[:anchor], np.arange(anchor)
            tokens[b, :, anchor : anchor + len(prompt.query)] = prompt.query
            positions[b, :, anchor : anchor + query] = n + np.arange(query)
            tokens[b, :, anchor + query :], positions[b, :, anchor + query :] = rest[index], anchor + index
            for r in range(shards):
                own = np.arange(r * share, min((r + 1) * share, anchor))
                kept[b, r] = len(own) + (index[r] < n - anchor).sum()
                places[b, r, : len(own)] = own
                places[b, r, len(own) : len(own) + 2 * block] = anchor + index[r]
        return Layout(
            segments=(("anchor", anchor), ("query", query), ("block", 2 * block)),
            tokens=tokens,
            positions=positions,
            block_rows=np.full(len(prompts), 2 * block, np.int32),
            document_tokens=np.asarray([len(p.document) for p in prompts], np.int32),
            embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
            kept_tokens=kept,
            kept_positions=places,
        )

    def keep(self, anchor: Array, blocks: Array, shard: Shard) -> tuple[Array, Int[Array, ""]]:
        """This shard's part of the anchor with its blocks right behind it, and the length of that part."""
        share = -(-self.anchor_tokens // shard.count)
        start = shard.index * share
        own = jnp.clip(self.anchor_tokens - start, 0, share)
        padded = jnp.pad(anchor, ((0, 0), (0, share * shard.count - anchor.shape[1]), (0, 0), (0, 0)))
        part = jax.lax.dynamic_slice_in_dim(padded, start, share, axis=1)
        room = jnp.concatenate([part, jnp.zeros_like(blocks)], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(room, blocks, own, axis=1), own

    def scores(
        self,
        q: Float[Array, "B M H D"],
        k: Float[Array, "B S K D"],
        exists: Int[Array, " B"],
        shard: Shard,
    ) -> Float[Array, "B S K"]:
        """Pooled mean product of keys [anchor, blocks] with the query's rows and a group's heads; the anchor masked."""
        real = jnp.arange(q.shape[1], dtype=jnp.int32) < shard.query_tokens[:, None]
        total = jnp.where(real[..., None, None], q.astype(jnp.float32), 0.0).sum(axis=1)
        mean = total.reshape(q.shape[0], k.shape[2], -1, q.shape[-1]).mean(axis=2)
        mean = mean / shard.query_tokens.astype(jnp.float32)[:, None, None]
        raw = jnp.einsum("bskd,bkd->bsk", k.astype(jnp.float32), mean, precision="highest")
        return pool_and_mask(raw, RowLimits(0, self.anchor_tokens, valid=self.anchor_tokens + exists), self.pool)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        q, k = x.rotated()
        anchor, n, p = self.anchor_tokens, shard.count, self.passing_tokens
        (_, query), (_, blocks) = shard.segments[1:]
        block = blocks // 2
        cuts = (anchor, anchor + query, anchor + query + block)
        (qa, qq, q1, q2), (ka, kq, k1, k2), (va, vq, v1, v2) = (jnp.split(a, cuts, axis=1) for a in (q, k, x.v))
        behind = shard.document_tokens - anchor
        exists = sum(jnp.clip(behind - c * block, 0, block) for c in (shard.index, 2 * n - 1 - shard.index))
        exists = jnp.asarray(exists, jnp.int32)
        scores = self.scores(qq, jnp.concatenate([ka, k1, k2], axis=1), exists, shard)[:, anchor:]

        def exchange(s: Array, keys: Array, values: Array) -> Array:
            """Everybody's selection, [B, N, P, K, 2D]."""
            _, k_sel, v_sel = select_topk(s, keys, values, p)
            return shard.placement.all_gather(jnp.concatenate([k_sel, v_sel], axis=-1), axis=1)

        first = exchange(scores[:, :block], k1, v1)
        second = exchange(scores[:, block:], k2, v2)
        kept_k, own = self.keep(ka, jnp.concatenate([k1, k2], axis=1), shard)
        kept_v, _ = self.keep(va, jnp.concatenate([v1, v2], axis=1), shard)
        zero = jnp.zeros_like(shard.query_tokens)
        seen = CachedLayer.of(kept_k, kept_v), own + exists, CachedLayer.of(kq, vq)
        out_query = decode_sharded(qq, *seen, zero, shard)
        causal = RowSegment(anchor, start=0, offset=0, end=anchor)
        out_anchor, _ = attend(Queries(qa), (Keys(ka, va),), (causal,), kernels)

        def out_block(qb: Array, kb: Array, vb: Array, passed: Array, used: Array) -> Array:
            """Rows of a block over the first ``used`` selections, right-aligned, the anchor and themselves."""
            slots = passed.shape[1] * p
            flat = passed.reshape(passed.shape[0], slots, *passed.shape[3:])
            flat = jnp.pad(flat, ((0, 0), (slots, 0), (0, 0), (0, 0)))
            flat = jax.lax.dynamic_slice_in_dim(flat, used * p, slots, axis=1)
            kp, vp = jnp.split(flat, 2, axis=-1)
            rows = RowSegment(block, start=slots - used * p, offset=slots + anchor, end=slots + anchor + block)
            ranges = (Keys(kp, vp), Keys(ka, va), Keys(kb, vb))
            return attend(Queries(qb), ranges, (rows,), kernels)[0]

        virtual = jnp.concatenate([first, second[:, ::-1]], axis=1)  # in document order
        out1 = out_block(q1, k1, v1, first[:, : n - 1] if n > 1 else first, jnp.asarray(shard.index, jnp.int32))
        out2 = out_block(q2, k2, v2, virtual[:, : 2 * n - 1], 2 * n - 1 - shard.index)
        return jnp.concatenate([out_anchor, out_query, out1, out2], axis=1), (kept_k, kept_v)

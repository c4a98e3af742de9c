"""APB: anchor, passing blocks, own block (arXiv 2502.12085; thunlp/APB for everything the paper leaves open).

Every shard holds an anchor (the start of the document with the query embedded) and its block. Per layer each shard
selects the ``passing_tokens`` keys per KV head that a scorer ranks highest, one ``all_gather`` exchanges them, and the
rows of a block see the selections of earlier shards, the anchor, and their own block causally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, Queries, attend, project
from apb_jax.attention.base import AttentionMethod, Capabilities, KeptKV, Kernels, Layout, Prompt, Shard, block_layout
from apb_jax.errors import UserError
from apb_jax.model.layers import LayerInputs
from apb_jax.model.rope import rope_table
from apb_jax.retaining.query_scores import WINDOW, query_scores
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.retaining_score import pool_and_mask, retaining_score
from pallas_kernels.select import select_topk

SCORERS = ("heads", "query")


@dataclass(frozen=True)
class APB(AttentionMethod):
    """APB with an anchor of ``anchor_tokens`` (query included) and ``passing_tokens`` per shard and KV head.

    ``query_at``: index in the anchor where the query is embedded (behind the chat template's opening). ``scorer``:
    "heads" (trained retaining heads) or "query" (training-free). ``passing_tokens=0`` passes nothing (anchor only).
    """

    anchor_tokens: int
    passing_tokens: int
    query_at: int = 16
    scorer: str = "heads"
    embed_query: bool = True
    pool: int = 5

    name: ClassVar[str] = "apb"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        paper="APB, arXiv 2502.12085",
        needs_scorer=True,
        needs_query_in_prefill=True,
        tested=("exact limit", "recordings"),
    )

    def __post_init__(self) -> None:
        for field in ("anchor_tokens", "passing_tokens", "query_at"):
            if getattr(self, field) < 0:
                raise UserError(f"{field} is {getattr(self, field)}; it must be 0 or more")
        if self.scorer not in SCORERS:
            raise UserError(f"scorer {self.scorer!r} is unknown; choose one of {', '.join(SCORERS)}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"pool is {self.pool}; it must be an odd number of rows (the paper's code: 5)")

    def why_not(self, prompts: list[Prompt], shards: int) -> str | None:
        if shards == 1:
            return None
        for prompt in prompts:
            n, block = len(prompt.document), -(-len(prompt.document) // shards)
            embedded = len(prompt.embedded_query) if self.embed_query else 0
            if (shards - 1) * block >= n:
                return f"a document of {n} tokens does not give each of {shards} shards a block"
            if self.passing_tokens > block:
                return f"passing {self.passing_tokens} tokens out of blocks of {block} is not possible"
            if self.anchor_tokens and self.passing_tokens > block - self.anchor_tokens:
                return (
                    f"shard 0 may pass only what lies behind the anchor, {max(0, block - self.anchor_tokens)} tokens "
                    f"of its block of {block}; asked for {self.passing_tokens}"
                )
            if self.anchor_tokens and embedded + self.query_at > self.anchor_tokens:
                return (
                    f"an anchor of {self.anchor_tokens} tokens cannot hold a query of {embedded} tokens at index "
                    f"{self.query_at}"
                )
            if self.anchor_tokens - embedded > n:
                return f"an anchor of {self.anchor_tokens} tokens is longer than the document of {n}"
        if self.scorer == "query" and self.passing_tokens and not (self.embed_query and self.anchor_tokens):
            return "the training-free scorer reads the query in the anchor, and there is none"
        return None

    def layout(self, prompts: list[Prompt], shards: int) -> Layout:
        if shards == 1 or self.anchor_tokens == 0:
            return block_layout(prompts, shards)
        anchors = []
        for prompt in prompts:
            embedded = prompt.embedded_query if self.embed_query else prompt.embedded_query[:0]
            p, rest = self.query_at, self.anchor_tokens - len(embedded)
            anchors.append(np.concatenate([prompt.document[:p], embedded, prompt.document[p:rest]]))
        place = np.arange(self.anchor_tokens, dtype=np.int32)
        return block_layout(prompts, shards, prefix=(("anchor", np.stack(anchors), place),))

    def anchor_rows(self, shard: Shard) -> int:
        """Anchor rows at the head of every shard's rows; on shard 0 nothing but themselves sees them."""
        return self.anchor_tokens if shard.count > 1 else 0

    def score_limits(self, shard: Shard) -> dict[str, Any]:
        """Rows that do not exist (shard 0 has no anchor), may not be selected (the document's start), and exist."""
        first = shard.index == 0
        anchor = self.anchor_rows(shard)
        dead = jnp.where(first, anchor, 0)
        return {"dead_rows": dead, "masked_rows": dead + anchor, "valid_rows": anchor + shard.block_rows}

    def scores(self, x: LayerInputs, k: Float[Array, "B S K D"], shard: Shard) -> Float[Array, "B S K"]:
        """Pooled and masked scores of all local rows, float32; ``k`` after RoPE."""
        limits = self.score_limits(shard)
        if self.scorer == "heads":
            if x.retaining is None:
                raise UserError("this model has no retaining heads; give --heads FILE or --scorer query")
            hidden = x.retaining.hidden(x.q, x.k, x.v, x.tp_axis)
            return retaining_score(None, None, x.retaining.fc2, hidden=hidden, pool=self.pool, **limits)
        anchor = self.anchor_rows(shard)
        window = min(WINDOW, anchor - self.query_at)
        behind = shard.document_tokens + shard.embedded_query_tokens
        places = behind[:, None] - window + jnp.arange(window, dtype=jnp.int32)[None]
        cos, sin = rope_table(x.rope, x.q.shape[-1], places)
        raw = query_scores(
            x.q[:, :anchor],
            k[:, anchor:],
            query_at=self.query_at,
            query_tokens=shard.embedded_query_tokens,
            cos=cos,
            sin=sin,
            block_rows=shard.block_rows,
        )
        raw = jnp.pad(raw, ((0, 0), (anchor, 0), (0, 0)))
        return pool_and_mask(raw, pool=self.pool, **limits)

    def exchange(
        self, scores: Float[Array, "B S K"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"], shard: Shard
    ) -> tuple[Int[Array, "B P K"], Float[Array, "B TP K D"], Float[Array, "B TP K D"]]:
        """Select, ``all_gather`` (one, K and V together), and put the earlier shards' tokens right-aligned.

        Returns the selected rows and the passing block of (N-1) * passing_tokens slots: in shard order, the slots of
        this shard and later ones empty on the left.
        """
        index, k_sel, v_sel = select_topk(scores, k, v, self.passing_tokens)
        everything = jax.lax.all_gather(jnp.concatenate([k_sel, v_sel], axis=-1), shard.axis, axis=1, tiled=True)
        slots = (shard.count - 1) * self.passing_tokens
        padded = jnp.pad(everything, ((0, 0), (slots, 0), (0, 0), (0, 0)))
        passing = jax.lax.dynamic_slice_in_dim(padded, shard.index * self.passing_tokens, slots, axis=1)
        k_passing, v_passing = jnp.split(passing, 2, axis=-1)
        return index, k_passing, v_passing

    def exchange_positions(
        self, index: Int[Array, "B P K"], positions: Int[Array, "B S"], shard: Shard
    ) -> Int[Array, "B TP K"]:
        """Positions of the passing block's slots (only STRING asks for them); one more ``all_gather``."""
        chosen = jnp.take_along_axis(positions[..., None], index, axis=1)
        everything = jax.lax.all_gather(chosen, shard.axis, axis=1, tiled=True)
        slots = (shard.count - 1) * self.passing_tokens
        padded = jnp.pad(everything, ((0, 0), (slots, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(padded, shard.index * self.passing_tokens, slots, axis=1)

    def attend(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        passing: tuple[Float[Array, "B TP K D"], Float[Array, "B TP K D"]] | None,
        shard: Shard,
        kernels: Kernels,
        remapped: tuple[Queries, Int[Array, "B TP K"] | None] | None = None,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
        """(out, lse_nat): anchor rows see the anchor causally, block rows passing + anchor + block (causally).

        ``remapped``: under STRING, the queries with both rotations and the positions of the passing block.
        """
        anchor = self.anchor_rows(shard)
        slots = passing[0].shape[1] if passing else 0
        block = q.shape[1] - anchor
        used = shard.index * self.passing_tokens if slots else 0
        start = jnp.where(shard.index == 0, slots + anchor, slots - used)
        rows = [RowSegment(block, start=start, offset=slots + anchor, end=slots + anchor + block)]
        keys, values = [k[:, anchor:]], [v[:, anchor:]]
        if anchor:
            rows.insert(0, RowSegment(anchor, start=slots, offset=slots, end=slots + anchor))
            keys.insert(0, k[:, :anchor])
            values.insert(0, v[:, :anchor])
        if passing:
            keys.insert(0, passing[0])
            values.insert(0, passing[1])
        if remapped is None:
            return flash_attention(q, tuple(keys), tuple(values), tuple(rows), implementation=kernels.attention)
        queries, passed = remapped
        assert queries.positions is not None
        places = [p for p in (passed, queries.positions[:, :anchor], queries.positions[:, anchor:]) if p is not None]
        places = [p for p in places if p.shape[1]]
        ranges = [Keys(*one) for one in zip(keys, values, places, strict=True)]
        return attend(queries, ranges, rows)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, local = project(x)
        q, k = queries.near, local.k
        passing, places = None, None
        if self.passing_tokens and shard.count > 1:
            with jax.named_scope("apb_scores"):
                scores = self.scores(x, k, shard)
            with jax.named_scope("apb_exchange"):
                index, *pair = self.exchange(scores, k, x.v, shard)
                passing = (pair[0], pair[1])
                if local.positions is not None:
                    places = self.exchange_positions(index, local.positions, shard)
        with jax.named_scope("apb_attention"):
            remapped = None if queries.rope is None else (queries, places)
            out, _ = self.attend(q, k, x.v, passing, shard, kernels, remapped)
        anchor = self.anchor_rows(shard)
        return out, (k[:, anchor:], x.v[:, anchor:])

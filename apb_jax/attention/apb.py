"""APB: anchor, passing blocks, own block (arXiv 2502.12085; thunlp/APB for everything the paper leaves open).

Every shard holds an anchor (the start of the document with the query embedded) and its block. Per layer each shard
selects the ``passing_tokens`` keys per KV head that a scorer ranks highest, one ``all_gather`` exchanges them, and the
rows of a block see the selections of earlier shards, the anchor, and their own block causally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, Queries, attend, project
from apb_jax.attention.budgets import apb_budget
from apb_jax.attention.expected_scores import FUTURE, expected_scores
from apb_jax.attention.inputs import DEFAULT_KERNELS, KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, block_layout, bucket, surely
from apb_jax.attention.method import ONE_SHARD, AttentionMethod, Capabilities, Setup
from apb_jax.attention.query_scores import WINDOW, query_scores
from apb_jax.attention.reconstruct_scores import CHUNK, reconstruct_scores
from apb_jax.attention.shared_anchor import anchor_edge, gather_with_anchor, share_anchor
from apb_jax.attention.wire import pack, unpack
from apb_jax.errors import UserError
from apb_jax.rope.base import rope_table
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.retaining_score import RowLimits, pool_and_mask, retaining_score
from pallas_kernels.select import select_topk

AGNOSTIC = ("expected", "reconstruct")
"""Training-free scorers that know no question."""
SCORERS = ("heads", "query", *AGNOSTIC)

TRAINING_FREE = {
    "query": "the query's own attention",
    "expected": "Expected Attention",
    "reconstruct": "what a repetition of the text looks at",
}


@dataclass(frozen=True)
class APB(AttentionMethod):
    """APB with an anchor of ``anchor_tokens`` (query included) and ``passing_tokens`` per shard and KV head.

    ``query_at``: index in the anchor where the query is embedded; None: behind the chat template's opening, which the
    engine knows (0 without one). ``scorer``: "heads" (trained retaining heads), or without training "query",
    "expected" (``expected_scores.py``) or "reconstruct" (``reconstruct_scores.py``). ``embed_query=False``: the prefill
    does not know the question, so that one serves many; every scorer but "query" can do that.
    ``passing_tokens=0`` passes nothing (anchor only).
    ``shared_anchor``: an exact rewrite of ours, which a method given by name uses. The anchor sees only itself, so each
    shard computes 1 / N of its rows, and keys and values travel with the selected ones, instead of every shard
    computing all of it.
    """

    anchor_tokens: int
    passing_tokens: int
    query_at: int | None = None
    scorer: str = "heads"
    embed_query: bool = True
    pool: int = 5
    shared_anchor: bool = False

    name: ClassVar[str] = "apb"
    shards_alone: ClassVar[int] = 8
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        paper="APB, arXiv 2502.12085",
        needs_scorer=True,
        needs_query_in_prefill=True,
        tested=("exact limit", "recordings"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("anchor_tokens", "passing_tokens", "query_at"):
            if (getattr(self, field) or 0) < 0:
                raise UserError(f"{field} is {getattr(self, field)}; it must be 0 or more")
        if self.scorer not in SCORERS:
            raise UserError(f"scorer {self.scorer!r} is unknown; choose one of {', '.join(SCORERS)}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"pool is {self.pool}; it must be an odd number of rows (the paper's code: 5)")

    @property
    def place(self) -> int:
        """Index of the embedded query in the anchor."""
        return self.query_at or 0

    @classmethod
    def refuse(cls, setup: Setup, options: Mapping[str, Any]) -> str | None:
        if options.get("scorer") == "heads" and not setup.has_heads:
            return (
                f"method {cls.name!r} needs retaining heads and {setup.model} has none; give --heads FILE or "
                "--scorer query"
            )
        return super().refuse(setup, options)

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """Budgets from the table by length, shrunk to what the shards' blocks can give; the anchor shared."""
        # From lengths that programs are compiled for, so that documents of about one length share a program.
        block = surely(-(-setup.shortest // setup.shards))
        row = apb_budget(bucket(block) * setup.shards, setup.model)
        embed = options.get("embed_query", True)
        embedded = max(len(p.embedded_query) for p in setup.prompts) if embed else 0
        query_at = options.get("query_at", setup.query_at)
        # Room for the query and as much of the document; never more than leaves shard 0 something to pass.
        room = max(min(row.anchor_tokens, block // 2), min(bucket(query_at + 2 * embedded), 3 * block // 4))
        anchor = options.get("anchor_tokens", room)
        decided = {
            "anchor_tokens": anchor,
            "passing_tokens": max(0, min(row.passing_tokens, block - anchor)),
            "query_at": query_at,
            "scorer": cls.scorer_without(setup, embed),
            "shared_anchor": True,
        }
        return cls(**{**decided, **options})

    def completed(self, setup: Setup) -> tuple[Self, tuple[str, ...]]:
        """``query_at`` as the chat template has it; the training-free scorer where the model has no heads."""
        whole = self if self.query_at is not None else replace(self, query_at=setup.query_at)
        if self.scorer == "heads":
            whole = replace(whole, scorer=self.scorer_without(setup, self.embed_query))
        notes = []
        if not self.embed_query:
            notes.append("prefilled without the question")
        if self.passing_tokens and not setup.has_heads:
            notes.append(f"no retaining heads: keys are scored by {TRAINING_FREE[whole.scorer]} (training-free)")
        return whole, tuple(notes) if setup.shards > 1 else ()

    @staticmethod
    def scorer_without(setup: Setup, embed_query: bool) -> str:
        """The retaining heads where there are some, else the training-free scorer that fits."""
        if setup.has_heads:
            return "heads"
        return "query" if embed_query else AGNOSTIC[0]

    def why_not(self, prompts: Sequence[Prompt], shards: int) -> str | None:
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
            if self.anchor_tokens and embedded + self.place > self.anchor_tokens:
                return (
                    f"an anchor of {self.anchor_tokens} tokens cannot hold a query of {embedded} tokens at index "
                    f"{self.place}"
                )
            if self.anchor_tokens - embedded > n:
                return f"an anchor of {self.anchor_tokens} tokens is longer than the document of {n}"
        if self.scorer == "query" and self.passing_tokens and not (self.embed_query and self.anchor_tokens):
            return "the training-free scorer reads the query in the anchor, and there is none"
        return None

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if shards == 1:
            return ONE_SHARD
        if self.anchor_tokens == 0 and all(-(-len(p.document) // shards) <= self.passing_tokens for p in prompts):
            return f"passing {self.passing_tokens} tokens of every block passes all of them"
        return None

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        if shards == 1 or self.anchor_tokens == 0:
            return block_layout(prompts, shards)
        anchors = []
        for prompt in prompts:
            embedded = prompt.embedded_query if self.embed_query else prompt.embedded_query[:0]
            p, rest = self.place, self.anchor_tokens - len(embedded)
            anchors.append(np.concatenate([prompt.document[:p], embedded, prompt.document[p:rest]]))
        if self.shared_anchor:
            return share_anchor(block_layout(prompts, shards), np.stack(anchors))
        place = np.arange(self.anchor_tokens, dtype=np.int32)
        return block_layout(prompts, shards, prefix=(("anchor", np.stack(anchors), place),))

    def visible_keys(self, layout: Layout, shard: int) -> dict[str, int]:
        """The whole anchor, also where each shard holds a part of its rows."""
        keys = {"passing": shard * self.passing_tokens} | super().visible_keys(layout, shard)
        return keys | {"anchor": self.anchor_tokens} if "anchor" in keys else keys

    def anchor_rows(self, shard: Shard) -> int:
        """Anchor rows at the head of every shard's rows; on shard 0 nothing but themselves sees them."""
        if shard.count == 1:
            return 0
        return -(-self.anchor_tokens // shard.count) if self.shared_anchor else self.anchor_tokens

    def score_limits(self, shard: Shard, lead: int) -> RowLimits:
        """Limits of scores with ``lead`` anchor rows in front of the block's.

        Rows that do not exist (shard 0 has no anchor), may not be selected (the document's start), and exist.
        """
        first = shard.index == 0
        dead = jnp.where(first, lead, 0)
        masked = lead + jnp.where(first, self.anchor_tokens if shard.count > 1 else 0, 0)
        return RowLimits(dead, masked, valid=lead + shard.block_rows)

    def scores(self, x: LayerInputs, k: Float[Array, "B S K D"], shard: Shard) -> Float[Array, "B S K"]:
        """Pooled and masked scores of all local rows, float32; ``k`` after RoPE.

        With a shared anchor, rows of the block alone: of the anchor only the rows that pooling reaches are needed.
        """
        anchor = self.anchor_rows(shard)
        if self.scorer == "heads":
            if x.retaining is None:
                raise UserError("this model has no retaining heads; give --heads FILE or --scorer query")
            hidden, lead = x.retaining.hidden(x.q, x.k, x.v, x.tp_axis), anchor
            if self.shared_anchor and anchor:
                lead = min(self.pool // 2, self.anchor_tokens)
                edge = anchor_edge(hidden[:, :anchor], self.anchor_tokens, lead, shard)
                hidden = jnp.concatenate([edge, hidden[:, anchor:]], axis=1)
            limits = self.score_limits(shard, lead)
            pooled = retaining_score(None, None, x.retaining.fc2, limits=limits, pool=self.pool, hidden=hidden)
            return pooled[:, lead:] if self.shared_anchor else pooled
        if self.scorer in AGNOSTIC:
            raw = self.agnostic_scores(x, k[:, anchor:], shard)
        else:
            raw = self.query_scores(x, k[:, anchor:], shard)
        lead = 0 if self.shared_anchor else anchor
        raw = jnp.pad(raw, ((0, 0), (lead, 0), (0, 0)))  # the anchor's own rows score 0, which no block row is below
        return pool_and_mask(raw, self.score_limits(shard, lead), self.pool)

    def agnostic_scores(self, x: LayerInputs, k: Float[Array, "B C K D"], shard: Shard) -> Float[Array, "B C K"]:
        """Scores of the block's keys by its own queries, as if they stood behind the document."""
        anchor = self.anchor_rows(shard)
        q, v = x.q[:, anchor:], x.v[:, anchor:]
        reach = FUTURE if self.scorer == "expected" else min(CHUNK, q.shape[1])
        places = shard.document_tokens[:, None] + jnp.arange(reach, dtype=jnp.int32)[None]
        cos, sin = rope_table(x.rope, q.shape[-1], places)
        if self.scorer == "expected":
            return expected_scores(q, k, v, cos=cos, sin=sin, block_rows=shard.block_rows)
        return reconstruct_scores(q, k, cos=cos, sin=sin, block_rows=shard.block_rows)

    def query_scores(self, x: LayerInputs, k: Float[Array, "B C K D"], shard: Shard) -> Float[Array, "B C K"]:
        """Scores of the block's keys by the query in the anchor."""
        anchor = self.anchor_rows(shard)
        asked = x.q[:, :anchor]
        if self.shared_anchor:
            asked = shard.placement.all_gather(asked, axis=1, tiled=True)[:, : self.anchor_tokens]
        window = min(WINDOW, asked.shape[1] - self.place)
        behind = shard.document_tokens + shard.embedded_query_tokens
        places = behind[:, None] - window + jnp.arange(window, dtype=jnp.int32)[None]
        cos, sin = rope_table(x.rope, x.q.shape[-1], places)
        return query_scores(
            asked,
            k,
            query_at=self.place,
            query_tokens=shard.embedded_query_tokens,
            cos=cos,
            sin=sin,
            block_rows=shard.block_rows,
        )

    def exchange(
        self,
        scores: Float[Array, "B S K"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        shard: Shard,
        kernels: Kernels = DEFAULT_KERNELS,
    ) -> tuple[Int[Array, "B P K"], Float[Array, "B TP K D"], Float[Array, "B TP K D"]]:
        """Select, ``all_gather`` (one, K and V together), and put the earlier shards' tokens right-aligned.

        Returns the selected rows and the passing block of (N-1) * passing_tokens slots: in shard order, the slots of
        this shard and later ones empty on the left.
        """
        index, k_sel, v_sel = select_topk(scores, k, v, self.passing_tokens)
        everything = shard.placement.all_gather(pack(k_sel, v_sel, kernels.exchange), axis=1, tiled=True)
        k_passing, v_passing = unpack(self.earlier(everything, shard), kernels.exchange, k.dtype)
        return index, k_passing, v_passing

    def exchange_with_anchor(
        self,
        scores: Float[Array, "B C K"] | None,
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        shard: Shard,
        kernels: Kernels = DEFAULT_KERNELS,
    ) -> tuple[Int[Array, "B P K"] | None, KeptKV, KeptKV | None]:
        """The same with a shared anchor, whose keys and values travel along: (selected rows, anchor, passing block)."""
        rows = self.anchor_rows(shard)
        mine = pack(k[:, :rows], v[:, :rows], kernels.exchange)
        index, chosen = None, mine[:, :0]
        if scores is not None:
            index, *pair = select_topk(scores, k[:, rows:], v[:, rows:], self.passing_tokens)
            index, chosen = index + rows, pack(pair[0], pair[1], kernels.exchange)
        anchor, everything = gather_with_anchor(mine, chosen, self.anchor_tokens, shard)
        whole = unpack(anchor, kernels.exchange, k.dtype)
        if scores is None:
            return index, whole, None
        return index, whole, unpack(self.earlier(everything, shard), kernels.exchange, k.dtype)

    def earlier(self, everything: Float[Array, "B NP K E"], shard: Shard) -> Float[Array, "B TP K E"]:
        """Of all shards' selections those of earlier ones, right-aligned behind empty slots."""
        slots = (shard.count - 1) * self.passing_tokens
        padded = jnp.pad(everything, ((0, 0), (slots, 0), *[(0, 0)] * (everything.ndim - 2)))
        return jax.lax.dynamic_slice_in_dim(padded, shard.index * self.passing_tokens, slots, axis=1)

    def exchange_positions(
        self, index: Int[Array, "B P K"], positions: Int[Array, "B S"], shard: Shard
    ) -> Int[Array, "B TP K"]:
        """Positions of the passing block's slots (only STRING asks for them); one more ``all_gather``."""
        chosen = jnp.take_along_axis(positions[..., None], index, axis=1)
        return self.earlier(shard.placement.all_gather(chosen, axis=1, tiled=True), shard)

    def attend(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        passing: tuple[Float[Array, "B TP K D"], Float[Array, "B TP K D"]] | None,
        shard: Shard,
        kernels: Kernels,
        remapped: tuple[Queries, Int[Array, "B TP K"] | None] | None = None,
        anchor: tuple[Float[Array, "B A K D"], Float[Array, "B A K D"]] | None = None,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
        """(out, lse_nat): anchor rows see the anchor causally, block rows passing + anchor + block (causally).

        ``remapped``: under STRING, the queries with both rotations and the positions of the passing block. ``anchor``:
        keys and values of the whole anchor where local rows hold a part of it.
        """
        local = self.anchor_rows(shard)
        block = (k[:, local:], v[:, local:])
        if anchor is None and local:
            anchor = (k[:, :local], v[:, :local])
        slots = passing[0].shape[1] if passing else 0
        whole = anchor[0].shape[1] if anchor else 0
        rows = q.shape[1] - local
        used = shard.index * self.passing_tokens if slots else 0
        start = jnp.where(shard.index == 0, slots + whole, slots - used)
        segments = [RowSegment(rows, start=start, offset=slots + whole, end=slots + whole + rows)]
        if anchor:
            first = slots + shard.index * local if self.shared_anchor else slots
            segments.insert(0, RowSegment(local, start=slots, offset=first, end=slots + whole))
        ranges = [one for one in (passing, anchor, block) if one]
        keys, values = tuple(one[0] for one in ranges), tuple(one[1] for one in ranges)
        if remapped is None:
            return flash_attention(
                q, keys, values, tuple(segments), implementation=kernels.attention, eight=kernels.eight
            )
        queries, passed = remapped
        assert queries.positions is not None
        places = [passed] if passing else []
        places += [jnp.broadcast_to(jnp.arange(whole, dtype=jnp.int32), (q.shape[0], whole))] if anchor else []
        places.append(queries.positions[:, local:])
        return attend(queries, [Keys(*one) for one in zip(keys, values, places, strict=True)], segments)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, local = project(x)
        q, k = queries.near, local.k
        rows = self.anchor_rows(shard)
        index, passing, places, anchor, scores = None, None, None, None, None
        if self.passing_tokens and shard.count > 1:
            with jax.named_scope("apb_scores"):
                scores = self.scores(x, k, shard)
        with jax.named_scope("apb_exchange"):
            if self.shared_anchor and rows:
                index, anchor, passing = self.exchange_with_anchor(scores, k, x.v, shard, kernels)
            elif scores is not None:
                index, *pair = self.exchange(scores, k, x.v, shard, kernels)
                passing = (pair[0], pair[1])
            if index is not None and local.positions is not None:
                places = self.exchange_positions(index, local.positions, shard)
        with jax.named_scope("apb_attention"):
            remapped = None if queries.rope is None else (queries, places)
            out, _ = self.attend(q, k, x.v, passing, shard, kernels, remapped, anchor)
        return out, (k[:, rows:], x.v[:, rows:])

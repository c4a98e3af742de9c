"""Star Attention: blocks that see the first block as an anchor, no communication in prefill (arXiv 2411.17116)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, attend, keys_of, project, rows_of
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, bucket
from apb_jax.attention.method import ONE_SHARD, AttentionMethod, Capabilities
from apb_jax.errors import UserError
from pallas_kernels.flash_attention import RowSegment


@dataclass(frozen=True)
class Star(AttentionMethod):
    """Every block but the first sees an anchor, the document's first tokens, and itself causally.

    ``block_tokens=None``: thunlp/APB's variant, one block of ceil(n / N) tokens per shard with the whole first block as
    anchor. An int: NVIDIA's, blocks of that size spread evenly over the shards (the first ones get the extra blocks),
    an anchor of ``anchor_tokens`` (default: a whole block). Their padding positions differ too, which no real row sees.
    A shard computes the anchor's rows once for all its blocks; the originals once per block, with the same result.
    """

    block_tokens: int | None = None
    anchor_tokens: int | None = None

    name: ClassVar[str] = "star"
    shards_alone: ClassVar[int] = 8
    can: ClassVar[Capabilities] = Capabilities(
        exact=False, paper="Star Attention, arXiv 2411.17116", tested=("exact limit", "shards agree", "recordings")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        block, anchor = self.block_tokens, self.anchor_tokens
        if block is not None and block < 1:
            raise UserError(f"block_tokens is {block}; it must be at least 1")
        if anchor is not None and anchor < 1:
            raise UserError(f"anchor_tokens is {anchor}; it must be at least 1")
        if anchor is not None and block is None:
            raise UserError(f"anchor_tokens {anchor} needs block_tokens; without it the anchor is the first block")
        if anchor is not None and block is not None and anchor > block:
            raise UserError(
                f"anchor_tokens {anchor} exceeds block_tokens {block}; nearest legal choice: anchor_tokens {block}"
            )

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if self.block_tokens is None:
            return {1: ONE_SHARD, 2: "of two blocks the first one is the whole anchor"}.get(shards)
        blocks = -(-max(len(p.document) for p in prompts) // self.block_tokens)
        if blocks == 1:
            return f"one block of {self.block_tokens} tokens holds the document"
        if blocks == 2 and self.anchor_tokens in (None, self.block_tokens):
            return "of two blocks the first one is the whole anchor"
        return None

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        lengths = np.asarray([len(p.document) for p in prompts], np.int32)
        size = -(-lengths // shards) if self.block_tokens is None else np.full_like(lengths, self.block_tokens)
        blocks = -(-lengths // size)
        # Shard r holds blocks first[r] .. first[r + 1] - 1: an even split, the first shards take the rest.
        counts = blocks[:, None] // shards + (np.arange(shards) < (blocks % shards)[:, None])
        per_shard = int(counts.max())
        capacity = int(size[0]) if self.block_tokens is not None else bucket(int(size.max()))
        anchor = capacity if self.anchor_tokens is None else self.anchor_tokens
        # Without a second block nothing looks at an anchor; per-shard blocks always keep its rows (see anchor_rows).
        if shards == 1 if self.block_tokens is None else blocks.max() == 1:
            anchor = 0
        shape = (len(prompts), shards, anchor + per_shard * capacity)
        tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        kept = np.zeros(shape[:2], np.int32)
        for b, prompt in enumerate(prompts):
            head = prompt.document[: min(anchor, int(size[b]))]
            tokens[b, :, : len(head)] = head
            positions[b, :, :anchor] = np.arange(anchor)
            first = np.concatenate([[0], np.cumsum(counts[b])])
            for r in range(shards):
                start, stop = (min(int(first[r + i]) * int(size[b]), int(lengths[b])) for i in (0, 1))
                kept[b, r] = stop - start
                tokens[b, r, anchor : anchor + stop - start] = prompt.document[start:stop]
                positions[b, r, anchor:] = int(first[r]) * int(size[b]) + np.arange(per_shard * capacity)
        return Layout(
            segments=(("anchor", anchor), ("block", per_shard * capacity)),
            tokens=tokens,
            positions=positions,
            block_rows=(per_shard * size).astype(np.int32),
            document_tokens=lengths,
            embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
            kept_tokens=kept,
        )

    def anchor_rows(self, rows: int, shard: Shard) -> int:
        """Static anchor rows in front of ``rows`` local rows."""
        if self.block_tokens is None:
            return rows // 2 if shard.count > 1 else 0
        anchor = self.anchor_tokens or self.block_tokens
        return 0 if rows == self.block_tokens else anchor

    def attend_block(
        self,
        x: LayerInputs,
        anchor: Keys,
        first: Int[Array, " B"] | int,
        block: tuple[int, int],
        shard: Shard,
        kernels: Kernels,
    ) -> Float[Array, "B C H D"]:
        """Rows ``block`` of the shard over anchor keys from ``first`` on and themselves causally."""
        queries, keys = project(x)
        rows, slots = block[1] - block[0], anchor.tokens
        segment = RowSegment(rows, start=first, offset=slots, end=slots + rows)
        return attend(rows_of(queries, *block), (anchor, keys_of(keys, *block)), (segment,), kernels)[0]

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, keys = project(x)
        rows = queries.rows
        slots = self.anchor_rows(rows, shard)
        anchor = keys_of(keys, 0, slots)
        capacity = self.block_tokens or rows - slots
        outs, first = [], jnp.int32(0)
        if slots:
            causal = RowSegment(slots, start=0, offset=0, end=slots)
            outs.append(attend(rows_of(queries, 0, slots), (anchor,), (causal,), kernels)[0])
            if self.block_tokens is None:
                # A block shorter than its capacity: the anchor moves to the right end, so that rows see one interval.
                unused = slots - shard.block_rows
                anchor = jax.tree.map(lambda a: jax.vmap(lambda one, n: jnp.roll(one, n, axis=0))(a, unused), anchor)
                first = unused
        for number, start in enumerate(range(slots, rows, capacity)):
            # The document's first block has no anchor: it is the anchor.
            visible = jnp.where(shard.index == 0, slots, first) if number == 0 else first
            outs.append(self.attend_block(x, anchor, visible, (start, start + capacity), shard, kernels))
        return jnp.concatenate(outs, axis=1), (keys.k[:, slots:], keys.v[:, slots:])

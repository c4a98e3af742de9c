"""StarX: Star Attention's prefill with another merge, as published, and our sparse reading of its description.

Source: zer0-data/StarXAttention. As published it is not block-sparse: shards' outputs are averaged by heuristic weights
in place of the log-sum-exp merge. ``StarXSparse`` is what its README suggests, not what its code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys
from apb_jax.attention.decode import attend_remapped, attend_shard
from apb_jax.attention.inputs import Cached, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.merge import merge_shards
from apb_jax.attention.method import Capabilities, Setup
from apb_jax.attention.star import Star
from apb_jax.attention.xattention import BLOCK, attend_blocks, block_mass, check_estimator, select_blocks
from apb_jax.errors import UserError
from apb_jax.rope.string import StringRope


def shard_weight(
    q: Float[Array, "B M H D"],
    keys: Float[Array, "B T K D"],
    rows: Int[Array, " B"],
    tokens: Int[Array, " B"],
    stride: int,
) -> Float[Array, "B H"]:
    """Anti-diagonal score of the first min(rows, tokens) query rows with as many keys, float32.

    KV heads are tiled over the query heads (head h reads KV head h mod K), as the released scorer does it.
    """
    heads, dim = q.shape[2:]
    length = -(-q.shape[1] // stride) * stride
    used = jnp.arange(length, dtype=jnp.int32) < jnp.minimum(rows, tokens)[:, None]

    def cut(x: Array) -> Array:
        x = jnp.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1])), (0, 0), (0, 0)))
        x = jnp.where(used[..., None, None], x.astype(jnp.float32), 0.0)
        return x.reshape(x.shape[0], -1, stride, x.shape[2], dim)

    tiled = cut(keys)[:, :, ::-1]
    tiled = jnp.tile(tiled, (1, 1, 1, heads // keys.shape[2], 1))
    return jnp.einsum("bcahd,bcahd->bh", cut(q), tiled, precision="highest") * jnp.float32(dim**-0.5)


@dataclass(frozen=True)
class StarX(Star):
    """Star whose query phase and decoding average the shards' outputs with softmax weights of anti-diagonal scores.

    A single decoding row meets only padding in the scorer, so every weight is 1 / N there, as published.
    """

    stride: int = 16

    name: ClassVar[str] = "starx"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        paper="StarXAttention (repository)",
        tested=("exact limit", "selection oracle"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UserError(f"stride is {self.stride}; it must be at least 1 (the repository: 16)")

    def completed(self, setup: Setup) -> tuple[Self, tuple[str, ...]]:
        """A warning: the merge is the published one, which loses answers."""
        note = (
            "starx merges as published, a mean of the shards' outputs in place of the exact merge: "
            "most answers are lost (star and starx_sparse merge exactly)"
        )
        return self, (note,) if setup.shards > 1 else ()

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """On several shards the average of their outputs is another attention, whatever the blocks."""
        return super().equals_full(prompts, shards) if shards == 1 else None

    def decode(self, x: LayerInputs, cached: Cached, shard: Shard) -> Float[Array, "B M H D"]:
        q = x.rotated()[0]
        if isinstance(x.rope, StringRope):
            out, lse = attend_remapped(x, cached, shard)
        else:
            seen = (cached.document, cached.kept_tokens, cached.tail, cached.tail_offset)
            out, lse = attend_shard(q, *seen, shard, query_tokens=cached.query_tokens)
        if shard.count == 1:
            return out.astype(q.dtype)
        keys = cached.document.alone(q.dtype)[0]
        # The mean of the anchor's keys, from shard 0 to all: the first key that every shard's scorer sees.
        anchor = jnp.minimum(self.anchor_tokens or self.block_tokens or shard.block_rows, cached.kept_tokens)
        inside = (jnp.arange(keys.shape[1], dtype=jnp.int32) < anchor[:, None])[..., None, None]
        total = jnp.where(inside, keys.astype(jnp.float32), 0.0).sum(axis=1, keepdims=True)
        mean = total / jnp.maximum(anchor, 1).astype(jnp.float32)[:, None, None, None]
        sigma = shard.placement.psum(jnp.where(shard.index == 0, mean, 0.0))
        # The scorer sees at most as many keys as query rows; on the last shard the query's own keys stand in the cache.
        tail_rows = jnp.where(shard.index == shard.count - 1, cached.tail_offset + cached.rows, 0)
        width = q.shape[1]
        scored = jnp.concatenate([sigma, keys[:, :width].astype(jnp.float32)], axis=1)
        scored = _append(scored, cached.tail.alone(q.dtype)[0].astype(jnp.float32), cached.kept_tokens + 1)
        raw = shard_weight(q, scored, cached.rows, 1 + cached.kept_tokens + tail_rows, self.stride)
        # The exact merge with another weight: one score per head stands where each row's log-sum-exp would.
        return merge_shards(out, jnp.broadcast_to(raw[..., None], lse.shape), shard.placement).astype(q.dtype)


def _append(
    head: Float[Array, "B T K D"], tail: Float[Array, "B W K D"], at: Int[Array, " B"]
) -> Float[Array, "B T K D"]:
    """``head`` with ``tail`` written from row ``at`` on, where it reaches into it (a cache shorter than the query)."""
    row = jnp.arange(head.shape[1], dtype=jnp.int32)[None]
    source = jnp.clip(row - at[:, None], 0, tail.shape[1] - 1)
    moved = jnp.take_along_axis(tail, source[..., None, None], axis=1)
    return jnp.where((row >= at[:, None])[..., None, None], moved, head)


@dataclass(frozen=True)
class StarXSparse(Star):
    """Star with XAttention's block selection inside each block (the anchor always seen) and the exact merge: ours."""

    stride: int = 16
    threshold: float = 0.9
    sparse_block: int = BLOCK

    name: ClassVar[str] = "starx_sparse"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False, selects=True, paper="ours: Star + XAttention selection", remaps_positions=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_estimator(self.stride, self.threshold, self.sparse_block)
        for field in ("block_tokens", "anchor_tokens"):
            size = getattr(self, field)
            if size is None and field == "block_tokens":
                raise UserError(f"method 'starx_sparse' needs block_tokens, a multiple of {self.sparse_block}")
            if size is not None and size % self.sparse_block:
                nearest = max(1, round(size / self.sparse_block)) * self.sparse_block
                raise UserError(f"{field} is {size}; it must be a multiple of {self.sparse_block} (nearest: {nearest})")

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """One block per shard, rounded up to whole sparse blocks."""
        size = options.get("sparse_block", cls.sparse_block)
        block = -(-setup.longest // (setup.shards * size)) * size
        return cls(**{"block_tokens": block, **options})

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """Where star is full attention and the threshold leaves out no block."""
        return super().equals_full(prompts, shards) if self.threshold >= 1 else None

    def attend_block(
        self,
        x: LayerInputs,
        anchor: Keys,
        first: Int[Array, " B"] | int,
        block: tuple[int, int],
        shard: Shard,
        kernels: Kernels,
    ) -> Float[Array, "B C H D"]:
        q, k = x.rotated()
        size, slots = self.sparse_block, anchor.tokens
        start, stop = block
        keys = Keys(*(jnp.concatenate([a, b[:, start:stop]], axis=1) for a, b in ((anchor.k, k), (anchor.v, x.v))))
        q = q[:, start:stop]
        rows = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
        hidden = jnp.asarray(first, jnp.int32)
        mass = block_mass(
            q, keys.k, stride=self.stride, block=size, q_tokens=rows, k_tokens=rows + slots, offset=slots,
            first_key=hidden,
        )  # fmt: skip
        own = slots // size + jnp.arange(q.shape[1] // size, dtype=jnp.int32)[:, None]
        column = jnp.arange(keys.tokens // size, dtype=jnp.int32)[None]
        seen = (column <= own) & (column >= hidden // size)
        forced = ((column < slots // size) | (column == own)) & seen
        chosen = select_blocks(mass, forced, seen, jnp.full((q.shape[2],), self.threshold, jnp.float32))
        return attend_blocks(q, keys, chosen, size, slots)

"""InfLLM: a window, and blocks of far context looked up by representative keys (arXiv 2402.04617; thunlp/InfLLM).

Layer by layer over all steps, which is the original's step by step over all layers: a step's memory is its layer's own.
Memory stays on the device (the original's CPU offload changes speed, not values), and generation sees the document
densely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.attend import Keys, Queries
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.merge import merge_partials
from apb_jax.attention.method import AttentionMethod, Capabilities
from apb_jax.attention.window import sliding_window
from apb_jax.errors import UserError
from apb_jax.rope.base import rope_table, rotate
from pallas_kernels.flash_attention import RowSegment, flash_attention


def local_scores(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], window: int, step: int
) -> Float[Array, "B S H"]:
    """Attention that each key received from the rows in whose window it lay, per query head, float32.

    Probabilities are normalised over the window. S is a multiple of ``step``, the rows done at a time.
    """
    batch, rows, heads, dim = q.shape
    grouped = q.reshape(batch, rows // step, step, k.shape[2], -1, dim)
    padded = jnp.pad(k, ((0, 0), (window, 0), (0, 0), (0, 0)))
    precision = "highest" if q.dtype == jnp.float32 else None

    def one(total: Array, number: Array) -> tuple[Array, None]:
        tile = jax.lax.dynamic_index_in_dim(grouped, number, axis=1, keepdims=False)
        keys = jax.lax.dynamic_slice_in_dim(padded, number * step, window + step, axis=1)
        logits = jnp.einsum("bskgd,btkd->bkgst", tile, keys, precision=precision, preferred_element_type=jnp.float32)
        row = jnp.arange(step, dtype=jnp.int32)[:, None]
        key = jnp.arange(window + step, dtype=jnp.int32) - window  # both relative to the step's first row
        seen = (key <= row) & (row - key < window) & (key + number * step >= 0)
        p = jax.nn.softmax(jnp.where(seen, logits * jnp.float32(dim**-0.5), jnp.finfo(jnp.float32).min), axis=-1)
        received = jnp.where(seen, p, 0.0).sum(axis=3).reshape(batch, heads, -1).swapaxes(1, 2)
        before = jax.lax.dynamic_slice_in_dim(total, number * step, window + step, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, before + received, number * step, axis=1), None

    total = jnp.zeros((batch, window + rows, heads), jnp.float32)
    return jax.lax.scan(one, total, jnp.arange(rows // step, dtype=jnp.int32))[0][:, window:]


def representatives(
    k: Float[Array, "B N C K D"], scores: Float[Array, "B N C H"], count: int
) -> Float[Array, "B N H D"]:
    """Mean of each block's ``count`` best-scored keys (before RoPE), per query head, float32."""
    group = scores.shape[3] // k.shape[3]
    best = jax.lax.top_k(jnp.swapaxes(scores, 2, 3), count)[1]  # [B, N, H, count]
    by_head = jnp.repeat(jnp.swapaxes(k, 2, 3), group, axis=2)  # [B, N, H, C, D]
    return jnp.take_along_axis(by_head, best[..., None], axis=3).astype(jnp.float32).mean(axis=3)


def retrieve(
    q: Float[Array, "B S H D"],
    exists: Float[Array, "B S"],
    blocks: Float[Array, "B N H D"],
    packed: Int[Array, ""],
    count: int,
) -> Int[Array, "B count"]:
    """The ``count`` packed blocks nearest to the mean query of a step, all heads together, best first."""
    weight = exists / jnp.maximum(exists.sum(axis=1, keepdims=True), 1.0)
    mean = jnp.einsum("bshd,bs->bhd", q.astype(jnp.float32), weight, precision="highest")
    score = jnp.einsum("bhd,bnhd->bn", mean, blocks, precision="highest")
    score = jnp.where(jnp.arange(blocks.shape[1], dtype=jnp.int32) < packed, score, -jnp.inf)
    return jax.lax.top_k(score, count)[1].astype(jnp.int32)


@dataclass(frozen=True)
class InfLLM(AttentionMethod):
    """A window of ``local_tokens`` at true distances; first tokens, retrieved and unpacked blocks at one angle.

    Prompts are processed ``step_tokens`` rows at a time; each step retrieves ``retrieved_blocks`` of ``block_tokens``.
    """

    init_tokens: int = 128
    local_tokens: int = 4096
    block_tokens: int = 128
    retrieved_blocks: int = 16
    representative_tokens: int = 4
    step_tokens: int = 512

    name: ClassVar[str] = "infllm"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        selects=True,
        paper="InfLLM, arXiv 2402.04617",
        max_shards=1,
        remaps_positions=False,
        true_positions=False,
        tested=("exact limit", "selection oracle"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            least, value = 0 if field.name == "init_tokens" else 1, getattr(self, field.name)
            if value < least:
                raise UserError(f"{field.name} is {value}; it must be at least {least}")
        if self.representative_tokens > self.block_tokens:
            raise UserError(
                f"representative_tokens {self.representative_tokens} exceed block_tokens {self.block_tokens}; "
                f"nearest legal choice: {self.block_tokens}"
            )

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if max(len(p.document) for p in prompts) <= self.local_tokens:
            return f"the window of {self.local_tokens} tokens holds the whole document"
        return None

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        return chunk_layout(prompts, np.arange(shards)[:, None], multiple=self.step_tokens)

    def packed(self, seen: Int[Array, ""]) -> Int[Array, ""]:
        """Blocks that have left the window completely once ``seen`` tokens are processed."""
        return jnp.maximum((seen - self.init_tokens - self.local_tokens) // self.block_tokens, 0)

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        q, k = x.rotated()
        rows, window, step = q.shape[1], self.local_tokens, self.step_tokens
        near = sliding_window(Queries(q), Keys(k, x.v), window, kernels)
        if rows <= window:
            return near[0].astype(q.dtype), (k, x.v)
        size, first, batch = self.block_tokens, min(self.init_tokens, rows), q.shape[0]
        blocks = max(1, (rows - first) // size)

        def cut(a: Array) -> Array:
            """Rows behind the first ones as blocks [B, N, C, ...]."""
            a = a[:, first : first + blocks * size]
            a = jnp.pad(a, ((0, 0), (0, blocks * size - a.shape[1]), *[(0, 0)] * (a.ndim - 2)))
            return a.reshape(batch, blocks, size, *a.shape[2:])

        memory_k, memory_v = cut(x.k), cut(x.v)
        leaders = representatives(memory_k, cut(local_scores(q, k, window, step)), self.representative_tokens)
        angle = jnp.full((batch, rows), window - 1, jnp.int32)
        far_q = rotate(x.q, *rope_table(x.rope, q.shape[-1], angle))
        count = min(self.retrieved_blocks, blocks)
        room = step + size
        tail_k, tail_v = (jnp.pad(a, ((0, 0), (0, room), (0, 0), (0, 0))) for a in (x.k, x.v))

        def one(number: Array) -> tuple[Array, Array]:
            """(out, lse) of a step over everything before its window, keys without rotation."""
            seen = number * step
            mine = jax.lax.dynamic_slice_in_dim(far_q, seen, step, axis=1)
            real = seen + jnp.arange(step, dtype=jnp.int32) < shard.document_tokens[:, None]
            packed = self.packed(seen)
            chosen = retrieve(mine, real.astype(jnp.float32), leaders, packed, count)
            pick = chosen[:, :, None, None, None]
            looked_up = [
                jnp.take_along_axis(a, pick, axis=1).reshape(batch, count * size, *a.shape[3:])
                for a in (memory_k, memory_v)
            ]
            start = first + packed * size  # the first token that is neither kept from the start nor packed
            waiting = [jax.lax.dynamic_slice_in_dim(a, start, room, axis=1) for a in (tail_k, tail_v)]
            limit = seen - window  # row i sees tokens up to limit + i
            parts: Any = (
                (x.k[:, :first], x.v[:, :first], RowSegment(step, start=0, offset=limit, end=first)),
                (*waiting, RowSegment(step, start=0, offset=limit - start, end=room)),
                (
                    *looked_up,
                    RowSegment(step, start=0, offset=count * size, end=jnp.minimum(packed, count) * size),
                ),
            )
            return merge_partials(
                [
                    flash_attention(mine, (a,), (b,), (c,), implementation=kernels.attention, eight=kernels.eight)
                    for a, b, c in parts
                ]
            )

        outs, lses = jax.lax.map(one, jnp.arange(rows // step, dtype=jnp.int32))
        far = (
            jnp.moveaxis(outs, 0, 1).reshape(batch, rows, *q.shape[2:]),
            jnp.moveaxis(lses, 0, 2).reshape(batch, q.shape[2], rows),
        )
        return merge_partials([near, far])[0].astype(q.dtype), (k, x.v)

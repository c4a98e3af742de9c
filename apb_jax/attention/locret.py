"""Locret: chunked prefill that evicts what the retaining heads score low (arXiv 2410.01805; huangyuxiang03/Locret).

The original runs chunk after chunk through all layers; layer by layer over all chunks is the same computation, because
a layer's cache depends on that layer's own earlier rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, bucket
from apb_jax.attention.method import AttentionMethod, Capabilities
from apb_jax.errors import UserError
from apb_jax.precision import precision_of
from apb_jax.rope.base import rope_table, rotate
from pallas_kernels.flash_attention import RowSegment, flash_attention


@dataclass(frozen=True)
class Locret(AttentionMethod):
    """At most ``budget_tokens`` KV entries per head survive each chunk of ``chunk_tokens``; positions are re-assigned.

    The last ``local_tokens`` of the prompt (the query among them) are never evicted, nor are a chunk's ``stabilizers``
    last entries until the last chunk. ``query_first`` puts the query in front of the document too (Locret-Q). All the
    query counts as local here, also where it is longer than ``local_tokens``.
    """

    budget_tokens: int = 16384
    local_tokens: int = 100
    chunk_tokens: int = 1024
    stabilizers: int = 2500
    query_first: bool = False

    name: ClassVar[str] = "locret"
    can: ClassVar[Capabilities] = Capabilities(
        exact=False,
        selects=True,
        paper="Locret, arXiv 2410.01805",
        needs_heads=True,
        max_shards=1,
        remaps_positions=False,
        true_positions=False,
        tested=("exact limit", "selection oracle"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("budget_tokens", 1), ("chunk_tokens", 1), ("local_tokens", 0), ("stabilizers", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        if self.stabilizers >= self.budget_tokens:
            raise UserError(
                f"{self.stabilizers} stabilizers fill the budget of {self.budget_tokens}; "
                f"nearest legal choice: {self.budget_tokens - 1}"
            )

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        if not self.query_first and max(len(p.document) for p in prompts) <= self.budget_tokens:
            return f"the budget of {self.budget_tokens} tokens holds the whole document, so that nothing is evicted"
        return None

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        texts = [np.concatenate([p.query, p.document]) if self.query_first else p.document for p in prompts]
        rows = bucket(max(map(len, texts)))
        tokens = np.zeros((len(prompts), 1, rows), np.int32)
        for b, ids in enumerate(texts):
            tokens[b, 0, : len(ids)] = ids
        lengths = np.asarray([len(ids) for ids in texts], np.int32)
        local = np.asarray([max(self.local_tokens - len(p.query), 0) for p in prompts])
        chunked = np.maximum(lengths - local, 0)
        kept = (np.minimum(chunked, self.budget_tokens) + lengths - chunked).astype(np.int32)
        slots = min(self.budget_tokens, rows) + self.local_tokens
        return Layout(
            segments=(("block", rows),),
            tokens=tokens,
            positions=np.broadcast_to(np.arange(rows, dtype=np.int32), tokens.shape),
            block_rows=lengths,
            document_tokens=np.asarray([len(p.document) for p in prompts], np.int32),
            embedded_query_tokens=np.asarray([len(p.embedded_query) for p in prompts], np.int32),
            kept_tokens=kept[:, None],
            kept_positions=np.broadcast_to(np.arange(slots, dtype=np.int32), (len(prompts), 1, slots)),
            tail_position=kept,
        )

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        assert x.retaining is not None
        rows = x.q.shape[1]
        slots, chunk, local = min(self.budget_tokens, rows), self.chunk_tokens, self.local_tokens
        chunked = jnp.maximum(shard.block_rows - jnp.maximum(local - shard.query_tokens, 0), 0)
        hidden = x.retaining.hidden(x.q, x.k, x.v, x.tp_axis)
        scores = jnp.matmul(
            jax.nn.silu(hidden),
            x.retaining.fc2,
            precision=precision_of(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        count = -(-rows // chunk)

        def cut(a: Array) -> Array:
            a = jnp.pad(a, ((0, 0), (0, count * chunk - rows), *[(0, 0)] * (a.ndim - 2)))
            return jnp.moveaxis(a.reshape(a.shape[0], count, chunk, *a.shape[2:]), 1, 0)

        def attend(q: Array, k: Array, v: Array, state: State) -> Array:
            """Rows behind the cache's ``held`` entries, at contiguous positions."""
            own = state.held[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
            slot = jnp.arange(slots, dtype=jnp.int32) - (slots - state.held)[:, None]
            turn = lambda a, place: rotate(a, *rope_table(x.rope, a.shape[-1], place))  # noqa: E731
            segment = RowSegment(q.shape[1], start=slots - state.held, offset=slots, end=slots + q.shape[1])
            keys = (turn(state.k, slot), turn(k, own))
            return flash_attention(
                turn(q, own), keys, (state.v, v), (segment,), implementation=kernels.attention, eight=kernels.eight
            )[0]  # fmt: skip

        def step(state: State, part: tuple[Array, ...]) -> tuple[State, Array]:
            number, q, k, v, s = part
            out = attend(q, k, v, state)
            fresh = jnp.clip(chunked - number * chunk, 0, chunk)
            last = (number + 1) * chunk >= chunked
            return state.extend(k, v, s, fresh, jnp.where(last, 0, self.stabilizers)), out

        parts = (jnp.arange(count, dtype=jnp.int32), *(cut(a) for a in (x.q, x.k, x.v, scores)))
        state, outs = jax.lax.scan(step, State.empty(x.k, scores, slots), parts)
        out = jnp.moveaxis(outs, 0, 1).reshape(x.q.shape[0], count * chunk, *x.q.shape[2:])[:, :rows]
        k, v = state.left_aligned()
        if local:
            index = chunked[:, None] + jnp.arange(local, dtype=jnp.int32)
            take = lambda a: jnp.take_along_axis(a, jnp.minimum(index, rows - 1)[..., None, None], axis=1)  # noqa: E731
            ql, kl, vl = take(x.q), take(x.k), take(x.v)
            batch = jnp.arange(index.shape[0])[:, None]
            place = jnp.where(index < shard.block_rows[:, None], index, rows)
            out = out.at[batch, place].set(attend(ql, kl, vl, state), mode="drop")
            put = jax.vmap(lambda room, new, at: jax.lax.dynamic_update_slice_in_dim(room, new, at, axis=0))
            k, v = (
                put(jnp.pad(a, ((0, 0), (0, local), (0, 0), (0, 0))), new, state.held) for a, new in ((k, kl), (v, vl))
            )
        places = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
        return out, (rotate(k, *rope_table(x.rope, k.shape[-1], places)), v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A layer's compressed cache: keys before RoPE, in document order at the right end of the slots."""

    k: Float[Array, "B C K D"]
    v: Float[Array, "B C K D"]
    scores: Float[Array, "B C K"]
    held: Int[Array, " B"]

    @classmethod
    def empty(cls, k: Float[Array, "B S K D"], scores: Float[Array, "B S K"], slots: int) -> State:
        """No entries yet."""
        zero = jnp.zeros((k.shape[0], slots, *k.shape[2:]), k.dtype)
        return cls(zero, zero, jnp.zeros((*zero.shape[:3],), scores.dtype), jnp.zeros((k.shape[0],), jnp.int32))

    def extend(
        self,
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        scores: Float[Array, "B S K"],
        fresh: Int[Array, " B"],
        protected: Int[Array, " B"],
    ) -> State:
        """With ``fresh`` new entries, the best-scored kept; the last ``protected`` ones whatever their score."""
        slots = self.k.shape[1]
        join = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
        k, v, scores = join(self.k, k), join(self.v, v), join(self.scores, scores)
        index = jnp.arange(k.shape[1], dtype=jnp.int32)
        end = slots + fresh
        exists = (index >= (slots - self.held)[:, None]) & (index < end[:, None])
        safe = index >= (end - protected)[:, None]
        rank = jnp.where(safe[..., None], jnp.finfo(jnp.float32).max, scores)
        rank = jnp.where(exists[..., None], rank, -jnp.inf)
        best = jax.lax.top_k(jnp.swapaxes(rank, 1, 2), slots)[1].astype(jnp.int32)
        held = jnp.minimum(self.held + fresh, slots)
        # Unused places sort to the front: the entries stay right-aligned and in document order.
        best = jnp.where(jnp.arange(slots, dtype=jnp.int32) < held[:, None, None], best, -1)
        order = jnp.swapaxes(jnp.maximum(jnp.sort(best, axis=-1), 0), 1, 2)
        pick = lambda a: jnp.take_along_axis(a, order[..., None], axis=1)  # noqa: E731
        return State(pick(k), pick(v), jnp.take_along_axis(scores, order, axis=1), held)

    def left_aligned(self) -> tuple[Float[Array, "B C K D"], Float[Array, "B C K D"]]:
        """Keys and values with the first entry in slot 0."""
        move = jax.vmap(lambda a, n: jnp.roll(a, n, axis=0))
        return move(self.k, self.held), move(self.v, self.held)

"""Document KV in the host's memory: written behind the prefill, streamed through the devices by every token.

The devices hold a few layers of it at a time, so its length does not count against their memory; the first layers may
stay on them where there is room. What it costs is a read of all others over the host's link for the query and for each
token of the answer; attention itself, and so the answer, is the same as with the cache on the devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apb_jax.attention.method import AttentionMethod
from apb_jax.cache import TailCache
from apb_jax.decode import (
    CHUNK,
    Asked,
    DecodePlan,
    DecodeState,
    Held,
    TailRows,
    next_token,
    query_logits,
    through,
)
from apb_jax.kv_memory import DEVICE
from apb_jax.prefill import PrefillRows, PrefillState, embed, prefill_recipe
from apb_jax.programs import Lengths, Programs
from apb_jax.quantised_cache import AnyCache, cache_kind

PINNED = "pinned_host"
"""JAX's name of host memory that devices copy from and to by themselves."""
ON_DEVICE = 2
"""Layers of KV on their way that a device holds at most: the one in use, and the next."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostCache:
    """The document's KV: a cache of one layer for each layer of the model, behind the first ``stay`` in host memory."""

    parts: tuple[AnyCache, ...] = ()
    stay: int = field(default=0, metadata={"static": True})
    """So many of the first layers lie on the devices."""

    @property
    def layers(self) -> int:
        """Layers that are held here."""
        return len(self.parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer, K and V."""
        return self.parts[0].row_bytes

    @property
    def addressable(self) -> bool:
        """Whether this process sees all of it."""
        return self.parts[0].addressable

    def on_host(self, layer: int) -> dict[str, np.ndarray]:
        """One layer's arrays [B, rows, K, ...] by field."""
        return self.parts[layer].on_host(0)

    def grown(self, mesh: Mesh, part: AnyCache) -> HostCache:
        """With one more layer, which stays on the devices or begins to be copied from them."""
        return replace(self, parts=(*self.parts, part if self.layers < self.stay else moved(part, mesh, PINNED)))


def moved(part: AnyCache, mesh: Mesh, memory: str) -> AnyCache:
    """A cache in another memory of its devices; the copy runs behind what comes next."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec, memory_kind=memory), part.specs())
    copied: AnyCache = jax.device_put(part, shardings, may_alias=False)
    return copied


def prefill(
    programs: Programs,
    method: AttentionMethod,
    weights: nnx.State,
    tokens: Int[Array, "B N*S"],
    rows: PrefillRows,
    empty: tuple[int, int, Any],
    stay: int,
) -> Iterator[tuple[int, HostCache]]:
    """(layers done, cache so far) before the first and after every layer; a layer's copy runs behind the next one.

    ``empty``: requests, rows over all shards, and dtype of a layer's cache. ``stay``: as in ``HostCache``.
    """
    kept, x = HostCache(stay=stay), embed(programs, weights, tokens)
    yield 0, kept
    on_way: deque[AnyCache] = deque()
    for layer in range(programs.config.num_layers):
        if len(on_way) < ON_DEVICE:
            buffer = programs.document_cache(*empty, layers=1)
        else:
            buffer = on_way.popleft()
            jax.block_until_ready(kept.parts[layer - ON_DEVICE])  # its copy is done with the buffer
        state, start = PrefillState(x, buffer), programs.place(np.int32(layer))
        state = programs.call(*prefill_recipe(programs, method, 1, state), (weights, state, rows, start))
        assert state.cache is not None
        x, kept = state.x, kept.grown(programs.mesh, state.cache)
        if layer >= stay:
            on_way.append(state.cache)
        jax.block_until_ready(x)
        yield layer + 1, kept
    jax.block_until_ready(kept)


@dataclass
class Steps:
    """Query and decoding over a cache in host memory: the layers one after the other, the next one on its way."""

    programs: Programs
    plan: DecodePlan
    weights: nnx.State
    cache: HostCache

    def __post_init__(self) -> None:
        self.numbers = [self.programs.place(np.int32(layer)) for layer in range(self.cache.layers)]

    def query(
        self, tokens: Int[Array, "B M"], lengths: Lengths, tail: TailCache
    ) -> tuple[Float[Array, "B R V"], TailCache]:
        """As ``decode.query``."""
        new = TailRows.of_query(tokens, lengths, self.plan)
        x, tail = self._through(new, lengths, tail)
        return self._call(
            "query logits",
            (x, lengths),
            P(),
            lambda weights, x, lengths: query_logits(self.programs, self.plan, weights, x, lengths),
        ), tail

    def decode(
        self, asked: Asked, state: DecodeState
    ) -> tuple[Int[np.ndarray, "B Q"], Float[np.ndarray, "Q B V"], DecodeState]:
        """As ``decode.decode``: up to CHUNK tokens, fewer when every request is done or has enough."""
        told, rows = np.full((state.token.shape[0], CHUNK), -1, np.int32), []
        steps = min(CHUNK, int(asked.new_tokens) - int(state.made))
        states = DecodeState.specs()
        for place in range(steps):
            if bool(np.asarray(state.done).all()):
                break
            x, tail = self._through(TailRows.of_step(state, asked.lengths), asked.lengths, state.tail)
            state = DecodeState(state.token, state.done, state.made, state.key, tail)
            fresh, logits, state = self._call(
                "next token",
                (x, asked, state),
                (P(), P(), states),
                lambda weights, x, asked, state: next_token(self.programs, self.plan, weights, x, asked, state),
                (P(), P(), states),
            )
            told[:, place] = np.asarray(fresh)
            if self.plan.with_logits:
                rows.append(np.asarray(logits))
        return told, np.stack(rows) if rows else np.zeros((0,), np.float32), state

    def _through(self, new: TailRows, lengths: Lengths, tail: TailCache) -> tuple[Float[Array, "B M E"], TailCache]:
        """New tail tokens through all layers."""
        x = self._call(
            "embed tail", (new.tokens,), P(), lambda weights, tokens: self.programs.model(weights).embed(tokens)
        )
        parts, stay = self.cache.parts, self.cache.stay
        ahead = self._fetch(stay)
        for layer, number in enumerate(self.numbers):
            if layer < stay:
                x, tail = self._layer(x, new, lengths, parts[layer], tail, number)
                continue
            document = ahead  # lets go of the layer before: no more than two are here
            ahead = self._fetch(layer + 1)
            assert document is not None
            x, tail = self._layer(x, new, lengths, document, tail, number)
            jax.block_until_ready(x)  # else Python would begin the copies of all layers at once
        return x, tail

    def _fetch(self, layer: int) -> AnyCache | None:
        """A layer on its way to the devices; None behind the last."""
        if layer >= self.cache.layers:
            return None
        return moved(self.cache.parts[layer], self.programs.mesh, DEVICE)

    def _layer(
        self, x: Any, new: TailRows, lengths: Lengths, document: AnyCache, tail: TailCache, number: Any
    ) -> tuple[Any, TailCache]:
        """One layer's program; the tail is donated."""
        programs, plan, tails = self.programs, self.plan, TailCache.specs()
        own = cache_kind(programs.precision.kv).specs()

        def body(weights: Any, x: Any, new: TailRows, lengths: Lengths, document: Any, tail: Any, number: Any) -> Any:
            return through(programs, plan, weights, x, new, lengths, Held(document, number), tail)

        specs = (programs.specs, P(), P(), P(), own, tails, P())
        make = lambda: programs.traced(body, specs, (P(), tails), donate=(5,))  # noqa: E731
        args = (self.weights, x, new, lengths, document, tail, number)
        out: tuple[Any, TailCache] = programs.call("tail layer", plan, make, args)
        return out

    def _call(self, name: str, args: tuple[Any, ...], out: Any, body: Any, specs: tuple[Any, ...] | None = None) -> Any:
        """A program around ``body(weights, *args)``; ``specs``: of the arguments, replicated by default."""
        specs = specs or (P(),) * len(args)
        make = lambda: self.programs.traced(body, (self.programs.specs, *specs), out)  # noqa: E731
        return self.programs.call(name, self.plan, make, (self.weights, *args))

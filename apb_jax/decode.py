"""The device programs behind the prefill: the query over the sharded cache, then token by token, around one state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apb_jax.attention.decode import decode_on_device
from apb_jax.attention.full import Full
from apb_jax.attention.inputs import Cached, CachedLayer, LayerInputs
from apb_jax.attention.method import AttentionMethod
from apb_jax.cache import TailCache
from apb_jax.programs import Lengths, Programs, Recipe
from apb_jax.quantised_cache import AnyCache, cache_kind
from apb_jax.rope.string import StringRope
from apb_jax.sampling import draw, greedy

CHUNK = 16
"""Tokens decoded on the devices before the host looks: what is streamed at a time."""
BROKEN = -2
"""In place of a token whose logits hold NaN or infinity: the host turns it into an error."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asked:
    """What an answer was asked for with, replicated: arguments, so that other values are not another program."""

    lengths: Lengths
    stop: Int[Array, " Z"]
    """Ids that end an answer, filled up with -1."""
    new_tokens: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What goes from chunk to chunk, donated to each: the last token of every request and the KV of the tail."""

    token: Int[Array, " B"]
    done: Array
    """bool [B]: requests that met a stop id."""
    made: Int[Array, ""]
    """Tokens generated so far, ``token`` included."""
    key: Array
    """uint32 key data, so that it can be placed like any array."""
    tail: TailCache

    @staticmethod
    def specs() -> DecodeState:
        """Replicated, but for the heads of the tail over ``tp``."""
        return DecodeState(P(), P(), P(), P(), TailCache.specs())  # type: ignore[arg-type]


@dataclass(frozen=True)
class DecodePlan:
    """What decoding programs are compiled for, beside shapes."""

    method: AttentionMethod | None
    """The method where it decodes in its own way, else None: the common rule."""
    greedy: bool = True
    with_logits: bool = False
    bottom_right: bool = False
    """The originals' causal quirk of the query phase (thunlp/APB's code, not its paper)."""

    @classmethod
    def of(cls, method: AttentionMethod, **choices: bool) -> DecodePlan:
        """The plan of ``method``."""
        own = method if type(method).decode is not AttentionMethod.decode else None
        return cls(own, **choices)

    @property
    def rule(self) -> AttentionMethod:
        """Whose ``decode`` runs."""
        return self.method or Full()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TailRows:
    """M tail tokens of each request from slot ``slot`` on, ``rows`` of them real."""

    tokens: Int[Array, "B M"]
    slot: Int[Array, " B"]
    rows: Int[Array, " B"]
    query_tokens: Int[Array, " B"] | None = None
    """Given where the quirk of the query phase is asked for."""

    @classmethod
    def of_query(cls, tokens: Int[Array, "B M"], lengths: Lengths, plan: DecodePlan) -> TailRows:
        """The queries, from slot 0 on."""
        asked = lengths.query_tokens
        return cls(tokens, jnp.zeros_like(asked), asked, asked if plan.bottom_right else None)

    @classmethod
    def of_step(cls, state: DecodeState, lengths: Lengths) -> TailRows:
        """The last token of every answer."""
        slot = lengths.query_tokens + state.made - 1
        return cls(state.token[:, None], slot, jnp.ones_like(slot))


def extend(
    programs: Programs,
    plan: DecodePlan,
    weights: nnx.State,
    new: TailRows,
    lengths: Lengths,
    cache: AnyCache,
    tail: TailCache,
) -> tuple[Float[Array, "B M E"], TailCache]:
    """New tail tokens through all layers; inside a program."""
    x = programs.model(weights).embed(new.tokens)
    return through(programs, plan, weights, x, new, lengths, Held(cache, 0), tail)


@dataclass(frozen=True)
class Held:
    """Some layers' cache, and which layer is its first."""

    cache: AnyCache
    first: Int[Array, ""] | int

    def at(self, layer: Int[Array, ""]) -> CachedLayer:
        """Layer ``layer`` of the model."""
        return self.cache.at(layer - self.first)


def through(
    programs: Programs,
    plan: DecodePlan,
    weights: nnx.State,
    x: Float[Array, "B M E"],
    new: TailRows,
    lengths: Lengths,
    held: Held,
    tail: TailCache,
) -> tuple[Float[Array, "B M E"], TailCache]:
    """Hidden rows of new tail tokens through the layers that are held; inside a program."""
    placement, model = lengths.placement, programs.model(weights)
    positions = (lengths.tail_start + new.slot)[:, None] + jnp.arange(new.tokens.shape[1], dtype=jnp.int32)[None]

    def attend(inputs: LayerInputs, tail: TailCache) -> tuple[Any, TailCache]:
        tail = tail.write(inputs.layer, new.slot, inputs.rotated()[1], inputs.v)
        own_tail = tail.at(inputs.layer)
        if placement.local > 1 and plan.method is None and not isinstance(inputs.rope, StringRope):
            kept = lengths.kept_on_device()
            asked = (kept, own_tail, new.slot, new.query_tokens)
            return decode_on_device(inputs.rotated()[0], held.at(inputs.layer), *asked, placement), tail

        def one_shard(document: CachedLayer) -> Any:
            shard = lengths.shard()
            cached = Cached(
                document=document,
                kept_tokens=lengths.kept(shard),
                kept_positions=lengths.positions_of(shard),
                tail=own_tail,
                tail_offset=new.slot,
                tail_position=lengths.tail_start,
                rows=new.rows,
                query_tokens=new.query_tokens,
            )
            return plan.rule.decode(inputs, cached, shard)

        if placement.local == 1:
            return one_shard(held.at(inputs.layer)), tail
        # Every shard gives the merged rows: one copy of them is enough.
        alone = held.at(inputs.layer).alone(inputs.v.dtype)
        out = placement.each_shard(lambda k, v: one_shard(CachedLayer.of(k, v)), *alone)
        return out[:, : new.tokens.shape[1]], tail

    return model.run_layers(
        x, positions, attend, tail, start=held.first, count=held.cache.layers,
        where=replace(programs.where, slices=programs.slices, in_place=True),
    )  # fmt: skip


def query_logits(
    programs: Programs, plan: DecodePlan, weights: nnx.State, x: Float[Array, "B M E"], lengths: Lengths
) -> Float[Array, "B R V"]:
    """Logits of the query's last row (R = 1), or of all M rows; inside a program."""
    if not plan.with_logits:
        x = jnp.take_along_axis(x, (lengths.query_tokens - 1)[:, None, None], axis=1)
    return programs.model(weights).logits(x, replace(programs.where, slices=programs.slices))


def next_token(
    programs: Programs, plan: DecodePlan, weights: nnx.State, x: Float[Array, "B 1 E"], asked: Asked, state: DecodeState
) -> tuple[Int[Array, " B"], Float[Array, "B V"], DecodeState]:
    """(what the host is told, logits, state) of the next token, from the last one's hidden rows; inside a program."""
    logits = programs.model(weights).logits(x, replace(programs.where, slices=programs.slices))[:, 0]
    key, use = jax.random.split(jax.random.wrap_key_data(state.key))
    token = greedy(logits) if plan.greedy else draw(logits, use, asked.temperature, asked.top_p)
    broken = ~state.done & ~jnp.all(jnp.isfinite(logits), axis=1)
    done = state.done | jnp.any(token[:, None] == asked.stop[None], axis=1) | broken
    told = jnp.where(broken, BROKEN, jnp.where(done, -1, token))
    return told, logits, DecodeState(token, done, state.made + 1, jax.random.key_data(key), state.tail)


def query(
    programs: Programs,
    plan: DecodePlan,
    weights: nnx.State,
    tokens: Int[Array, "B M"],
    lengths: Lengths,
    cache: AnyCache,
    tail: TailCache,
) -> tuple[Float[Array, "B R V"], TailCache]:
    """The query over the sharded cache: logits of its last row (R = 1), or of all M rows; ``tail`` is donated."""
    return programs.call(*query_recipe(programs, plan), (weights, tokens, lengths, cache, tail))


def query_recipe(programs: Programs, plan: DecodePlan) -> Recipe:
    """What ``Programs`` compiles for ``query``."""

    def body(weights: Any, tokens: Any, lengths: Lengths, cache: AnyCache, tail: TailCache) -> Any:
        new = TailRows.of_query(tokens, lengths, plan)
        x, tail = extend(programs, plan, weights, new, lengths, cache, tail)
        return query_logits(programs, plan, weights, x, lengths), tail

    caches, tails = cache_kind(programs.precision.kv).specs(), TailCache.specs()
    make = lambda: programs.traced(  # noqa: E731
        body, (programs.specs, P(), P(), caches, tails), (P(), tails), donate=(4,)
    )
    return "query", plan, make


def decode(
    programs: Programs, plan: DecodePlan, weights: nnx.State, cache: AnyCache, asked: Asked, state: DecodeState
) -> tuple[Int[Array, "B Q"], Float[Array, "Q B V"], DecodeState]:
    """Up to CHUNK tokens on the devices in one ``while_loop``; ends early when every request is done or has enough.

    Returns the new tokens (-1 where a request had stopped or no step ran, BROKEN where logits are not finite), their
    logits where the plan wants them, and the state for the next call; ``state`` is donated.
    """
    return programs.call(*decode_recipe(programs, plan), (weights, cache, asked, state))


def decode_recipe(programs: Programs, plan: DecodePlan) -> Recipe:
    """What ``Programs`` compiles for ``decode``."""

    def body(weights: Any, cache: AnyCache, asked: Asked, state: DecodeState) -> Any:
        batch, vocabulary = state.token.shape[0], programs.config.vocab_size
        first = state.made

        def more(loop: Any) -> Any:
            _, _, state = loop
            return (state.made - first < CHUNK) & (state.made < asked.new_tokens) & ~jnp.all(state.done)

        def step(loop: Any) -> Any:
            out, rows, state = loop
            new = TailRows.of_step(state, asked.lengths)
            x, tail = extend(programs, plan, weights, new, asked.lengths, cache, state.tail)
            place = state.made - first
            told, logits, state = next_token(programs, plan, weights, x, asked, replace(state, tail=tail))
            rows = rows.at[place].set(logits) if plan.with_logits else rows
            return out.at[:, place].set(told), rows, state

        out = jnp.full((batch, CHUNK), -1, jnp.int32)
        rows = jnp.zeros((CHUNK, batch, vocabulary) if plan.with_logits else (0,), jnp.float32)
        return jax.lax.while_loop(more, step, (out, rows, state))

    states = DecodeState.specs()
    make = lambda: programs.traced(  # noqa: E731
        body, (programs.specs, cache_kind(programs.precision.kv).specs(), P(), states), (P(), P(), states), donate=(3,)
    )
    return "decode", plan, make

"""A request's programs, compiled side by side before anything runs: prefill, query and decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apb_jax.attention.layout import bucket
from apb_jax.attention.method import AttentionMethod
from apb_jax.cache import TailCache
from apb_jax.decode import Asked, DecodePlan, DecodeState, decode_recipe, query_recipe
from apb_jax.generation import Wanted
from apb_jax.mesh import SP
from apb_jax.prefill import PrefillRows, PrefillState, layer_groups, prefill_recipe
from apb_jax.quantised_cache import AnyCache

if TYPE_CHECKING:
    from apb_jax.engine import Engine


REPLICATED = P()


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of arrays: those may be donated while a program is still being compiled."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def compile_ahead(
    engine: Engine, method: AttentionMethod, rows: PrefillRows, cache: AnyCache, query_tokens: int, wanted: Wanted
) -> None:
    """Compile what a prefill of ``rows`` and the answer behind it need; returns when all is there.

    Raises what a program's compilation raises.
    """
    programs, config, dtype = engine.programs, engine.model.config, engine.model.dtype
    batch, layers = rows.positions.shape[0], config.num_layers

    def shaped(shape: tuple[int, ...], kind: Any, spec: P = REPLICATED) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(programs.mesh, spec))

    weights, document = abstract(engine.state), abstract(cache)
    hidden = shaped((*rows.positions.shape, config.hidden_size), dtype, P(None, SP, None))
    state, number = PrefillState(hidden, document), shaped((), jnp.int32)
    size = layers // layer_groups(layers)
    programs.ahead(*prefill_recipe(programs, method, size, state), (weights, state, abstract(rows), number))

    plan = DecodePlan.of(method, greedy=wanted.sampler.greedy, with_logits=wanted.logits)
    whole = wanted.logits and not wanted.answer_alone
    asking = replace(plan, greedy=True, with_logits=whole, bottom_right=engine.settings.bottom_right_query)
    lengths = replace(abstract(rows.lengths), segments=())
    slots = bucket(query_tokens) + bucket(wanted.new_tokens)
    tails = jax.eval_shape(lambda: TailCache.zeros(config, batch, slots, dtype))
    tail = jax.tree.map(lambda x, spec: shaped(x.shape, x.dtype, spec), tails, TailCache.specs())
    tokens = shaped((batch, bucket(query_tokens)), jnp.int32)
    programs.ahead(*query_recipe(programs, asking), (weights, tokens, lengths, document, tail))
    if wanted.new_tokens > 1:
        real = shaped((), jnp.float32)
        asked = Asked(lengths, shaped(wanted.stops.shape, jnp.int32), number, real, real)
        key = jax.random.key_data(jax.random.key(0))
        each, done = shaped((batch,), jnp.int32), shaped((batch,), jnp.bool_)
        going = DecodeState(each, done, number, shaped(key.shape, key.dtype), tail)
        programs.ahead(*decode_recipe(programs, plan), (weights, document, asked, going))
    programs.finish()

"""The device programs of the engine: the only ``shard_map`` and ``jit``. Compiled ahead and counted.

Global shapes are given in the signatures; inside a program every array is the shard's own part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import Cached, CachedLayer, Kernels, LayerInputs, Shard
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.cache import DocumentCache, TailCache
from apb_jax.measure.recovered import layer_shares
from apb_jax.mesh import SP, TP
from apb_jax.model.config import ModelConfig
from apb_jax.model.slices import WeightSlices
from apb_jax.model.transformer import Transformer
from apb_jax.sampling import Sampler
from apb_jax.virtual import on_one_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lengths:
    """Lengths of the requests, int32 [B], replicated: so that a new length does not mean a new program."""

    block_rows: Int[Array, " B"]
    document_tokens: Int[Array, " B"]
    embedded_query_tokens: Int[Array, " B"]
    query_tokens: Int[Array, " B"]
    kept_tokens: Int[Array, "B N"] | None = None
    """KV rows each shard keeps; None: contiguous blocks of ``block_rows``."""
    kept_positions: Int[Array, "B N C"] | None = None
    """Positions of each shard's cache rows; None where decoding does not ask for them."""
    tail_position: Int[Array, " B"] | None = None
    """Position of the first query token; None: right behind the document."""
    segments: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})
    """Those of the layout; programs behind the prefill do not depend on them and get none."""

    @classmethod
    def of(cls, layout: Layout, query_tokens: np.ndarray) -> Lengths:
        """Host arrays of a layout, to be placed on the mesh."""
        lengths = (layout.block_rows, layout.document_tokens, layout.embedded_query_tokens, query_tokens)
        kept = (layout.kept_tokens, layout.kept_positions, layout.tail_position)
        return cls(*lengths, *kept, layout.segments)  # type: ignore[arg-type]

    def shard(self, count: int) -> Shard:
        """This shard's view; call inside ``shard_map``."""
        index = jax.lax.axis_index(SP)
        lengths = (self.block_rows, self.document_tokens, self.embedded_query_tokens, self.query_tokens)
        return Shard(index, *lengths, count, SP, self.segments)

    @property
    def tail_start(self) -> Int[Array, " B"]:
        """Position of the first query token."""
        return self.document_tokens if self.tail_position is None else self.tail_position

    def kept(self, shard: Shard) -> Int[Array, " B"]:
        """Document tokens whose KV this shard keeps."""
        if self.kept_tokens is not None:
            return jnp.take(self.kept_tokens, shard.index, axis=1)
        return jnp.clip(self.document_tokens - shard.index * self.block_rows, 0, self.block_rows)

    def positions_of(self, shard: Shard) -> Int[Array, "B C"]:
        """Positions of this shard's cache rows."""
        assert self.kept_positions is not None
        return jnp.take(self.kept_positions, shard.index, axis=1)


def own_decode(method: AttentionMethod) -> AttentionMethod | None:
    """What query and decode programs depend on: the method where it decodes in its own way, else None."""
    return method if type(method).decode is not AttentionMethod.decode else None


@dataclass
class Programs:
    """Compiled programs of one model on one mesh, keyed by what they were compiled for."""

    config: ModelConfig
    graph: nnx.GraphDef
    specs: Any
    mesh: Mesh
    kernels: Kernels
    virtual_shards: int = 1
    """Shards of the document on each device of ``sp``; above 1 only where that axis has one device."""
    slices: WeightSlices | None = None
    """Given where query and decoding steps use the weights as slices over ``sp``."""
    compiled: dict[Any, Any] = field(default_factory=dict)
    compile_s: float = 0.0
    on_compile: Callable[[str], None] | None = None

    @property
    def shards(self) -> int:
        return self.mesh.shape[SP] * self.virtual_shards

    @property
    def tp_axis(self) -> str | None:
        return TP if self.mesh.shape[TP] > 1 else None

    def model(self, state: nnx.State) -> Transformer:
        """The transformer around the local weights."""
        return nnx.merge(self.graph, state)

    def place(self, tree: Any, specs: Any) -> Any:
        """Host arrays onto the mesh; every process must hold the same values."""

        def put(x: Any, spec: P) -> jax.Array:
            return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, spec), lambda index: x[index])

        return jax.tree.map(put, tree, specs)

    def traced(self, body: Callable[..., Any], in_specs: Any, out_specs: Any, donate: tuple[int, ...] = ()) -> Any:
        """``body`` as a jitted ``shard_map`` over the mesh, or with virtual shards as its equal on one device."""
        if self.virtual_shards > 1:
            return jax.jit(on_one_device(body, in_specs, out_specs, self.virtual_shards), donate_argnums=donate)
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def call(self, name: str, static: Any, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run program ``name``; compile it first where these static settings and shapes are new."""
        shapes = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(args))
        key = (name, static, shapes, jax.tree.structure(args))
        if key not in self.compiled:
            if self.on_compile:
                self.on_compile(name)
            started = time.perf_counter()
            self.compiled[key] = make().lower(*args).compile()
            self.compile_s += time.perf_counter() - started
        return self.compiled[key](*args)

    def zeros(self, kind: type[Any], batch: int, rows: int, dtype: Any) -> Any:
        """An empty ``DocumentCache`` or ``TailCache`` made on the devices, in its sharding."""
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), kind.specs())
        make = lambda: jax.jit(lambda: kind.zeros(self.config, batch, rows, dtype), out_shardings=shardings)  # noqa: E731
        return self.call(kind.__name__, (batch, rows, dtype), make, ())

    def peak_bytes(self) -> int:
        """The compiler's estimate of bytes per device: the largest program's arguments, outputs and temporaries."""
        peaks = [0]
        for program in self.compiled.values():
            stats = program.memory_analysis()
            if stats is not None:
                live = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
                peaks.append(live + stats.temp_size_in_bytes)
        return max(peaks)

    # ---- prefill -----------------------------------------------------------------------------------------------------

    def embed(self, state: nnx.State, tokens: Int[Array, "B N*S"]) -> Float[Array, "B N*S E"]:
        """Token embeddings of all local rows."""
        make = lambda: self.traced(  # noqa: E731 - one line a program
            lambda state, tokens: self.model(state).embed(tokens), (self.specs, P(None, SP)), P(None, SP, None)
        )
        return self.call("embed", None, make, (state, tokens))

    def prefill_program(self, method: AttentionMethod, layers: int) -> Any:
        """The jitted program of ``prefill``: ``layers`` layers in one scan; ``x`` and ``cache`` are donated."""

        def body(state: Any, x: Any, positions: Any, lengths: Lengths, cache: DocumentCache, start: Any) -> Any:
            shard = lengths.shard(self.shards)

            def attend(inputs: LayerInputs, cache: DocumentCache) -> tuple[Any, DocumentCache]:
                out, (k, v) = method.prefill(inputs, shard, self.kernels)
                return out, cache.write(inputs.layer, k, v)

            return self.model(state).run_layers(
                x, positions, attend, cache, start=start, count=layers, tp_axis=self.tp_axis
            )

        rows, hidden, caches = P(None, SP), P(None, SP, None), DocumentCache.specs()
        return self.traced(body, (self.specs, hidden, rows, P(), caches, P()), (hidden, caches), donate=(1, 4))

    def prefill(
        self,
        method: AttentionMethod,
        layers: int,
        state: nnx.State,
        x: Float[Array, "B N*S E"],
        positions: Int[Array, "B N*S"],
        lengths: Lengths,
        cache: DocumentCache,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "B N*S E"], DocumentCache]:
        """``layers`` layers from layer ``start`` on; ``x`` and ``cache`` are donated."""
        args = (state, x, positions, lengths, cache, start)
        return self.call("prefill", (method, layers), lambda: self.prefill_program(method, layers), args)

    def recovered(
        self,
        method: AttentionMethod,
        state: nnx.State,
        tokens: Int[Array, "B N*S"],
        positions: Int[Array, "B N*S"],
        lengths: Lengths,
        rows: Int[Array, "B N*R"],
    ) -> Float[Array, "L B H N*R"]:
        """Shares of full attention's mass that ``method`` sees on local ``rows``, by a prefill of its own."""

        def body(state: Any, tokens: Any, positions: Any, lengths: Lengths, rows: Any) -> Any:
            shard, model = lengths.shard(self.shards), self.model(state)

            def attend(inputs: LayerInputs, shares: Any) -> tuple[Any, Any]:
                out, (k, _) = method.prefill(inputs, shard, self.kernels)
                places = lengths.positions_of(shard)
                found = layer_shares(method, inputs, k, lengths.kept(shard), places, rows, shard, self.kernels)
                return out, shares.at[inputs.layer].set(found)

            heads = self.config.num_heads // self.mesh.shape[TP]
            shares = jnp.zeros((self.config.num_layers, rows.shape[0], heads, rows.shape[1]), jnp.float32)
            return model.run_layers(model.embed(tokens), positions, attend, shares, tp_axis=self.tp_axis)[1]

        local = P(None, SP)
        make = lambda: self.traced(body, (self.specs, local, local, P(), local), P(None, None, TP, SP))  # noqa: E731
        return self.call("recovered", method, make, (state, tokens, positions, lengths, rows))

    # ---- query and decode --------------------------------------------------------------------------------------------

    def _extend(
        self,
        state: nnx.State,
        tokens: Int[Array, "B M"],
        slot: Int[Array, " B"],
        lengths: Lengths,
        cache: DocumentCache,
        tail: TailCache,
        method: AttentionMethod,
        rows: Int[Array, " B"],
        bottom_right: bool,
    ) -> tuple[Float[Array, "B M E"], TailCache]:
        """M tail tokens from slot ``slot`` on, ``rows`` of them real, through all layers; local to a program."""
        shard, model = lengths.shard(self.shards), self.model(state)
        positions = (lengths.tail_start + slot)[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

        def attend(inputs: LayerInputs, tail: TailCache) -> tuple[Any, TailCache]:
            tail = tail.write(inputs.layer, slot, inputs.rotated()[1], inputs.v)
            document = cache.at(inputs.layer)
            if self.virtual_shards > 1:  # moving the mapped axis to the front would copy the whole stack
                document = CachedLayer.of(*document.alone())
            cached = Cached(
                document=document,
                kept_tokens=lengths.kept(shard),
                kept_positions=lengths.positions_of(shard),
                tail=tail.at(inputs.layer).alone(),
                tail_offset=slot,
                tail_position=lengths.tail_start,
                rows=rows,
                query_tokens=lengths.query_tokens if bottom_right else None,
            )
            return method.decode(inputs, cached, shard), tail

        start = jnp.int32(0)
        return model.run_layers(
            model.embed(tokens), positions, attend, tail,
            start=start, tp_axis=self.tp_axis, slices=self.slices, in_place=True,
        )  # fmt: skip

    def query(
        self,
        method: AttentionMethod,
        state: nnx.State,
        tokens: Int[Array, "B M"],
        lengths: Lengths,
        cache: DocumentCache,
        tail: TailCache,
        *,
        all_logits: bool,
        bottom_right: bool,
    ) -> tuple[Float[Array, "B R V"], TailCache]:
        """The query over the sharded cache: logits of its last row (R = 1) or of all M rows; ``tail`` is donated."""

        def body(state: Any, tokens: Any, lengths: Lengths, cache: DocumentCache, tail: TailCache) -> Any:
            slot = jnp.zeros_like(lengths.query_tokens)
            x, tail = self._extend(
                state, tokens, slot, lengths, cache, tail, method, lengths.query_tokens, bottom_right
            )
            if not all_logits:
                x = jnp.take_along_axis(x, (lengths.query_tokens - 1)[:, None, None], axis=1)
            return self.model(state).logits(x, self.tp_axis, self.slices), tail

        caches, tails = DocumentCache.specs(), TailCache.specs()
        make = lambda: self.traced(  # noqa: E731
            body, (self.specs, P(), P(), caches, tails), (P(), tails), donate=(4,)
        )
        static = (own_decode(method), all_logits, bottom_right)
        return self.call("query", static, make, (state, tokens, lengths, cache, tail))

    def decode(
        self,
        method: AttentionMethod,
        state: nnx.State,
        token: Int[Array, " B"],
        made: Int[Array, ""],
        done: Array,
        key: Array,
        stop: Int[Array, " Z"],
        lengths: Lengths,
        cache: DocumentCache,
        tail: TailCache,
        *,
        steps: int,
        sampler: Sampler,
        with_logits: bool,
    ) -> tuple[Int[Array, "B Q"], Float[Array, "Q B V"] | None, Int[Array, " B"], Array, Array, TailCache]:
        """Up to ``steps`` tokens on the devices in one ``while_loop``; ends early when every request is done.

        ``token``: the last token of each request, the ``made``-th generated one (0-based). Returns the new tokens
        (-1 where a request had stopped), their logits on request, and the state for the next call; ``tail`` is donated.
        ``key``: uint32 key data, so that it can be placed like any array.
        """

        def body(
            state: Any, token: Any, made: Any, done: Any, key: Any, stop: Any, lengths: Any, cache: Any, tail: Any
        ):
            batch, vocabulary = token.shape[0], self.config.vocab_size

            def more(loop: Any) -> Any:
                return (loop[0] < steps) & ~jnp.all(loop[2])

            def step(loop: Any) -> Any:
                i, token, done, key, out, rows, tail = loop
                x, tail = self._extend(
                    state,
                    token[:, None],
                    lengths.query_tokens + made + i,
                    lengths,
                    cache,
                    tail,
                    method,
                    jnp.ones_like(lengths.query_tokens),
                    bottom_right=False,
                )
                logits = self.model(state).logits(x, self.tp_axis, self.slices)[:, 0]
                key, draw = jax.random.split(key)
                token = sampler(logits, draw)
                done = done | jnp.any(token[:, None] == stop[None], axis=1)
                out = out.at[:, i].set(jnp.where(done, -1, token))
                rows = rows.at[i].set(logits) if with_logits else rows
                return i + 1, token, done, key, out, rows, tail

            out = jnp.full((batch, steps), -1, jnp.int32)
            rows = jnp.zeros((steps, batch, vocabulary) if with_logits else (0,), jnp.float32)
            loop = (jnp.int32(0), token, done, jax.random.wrap_key_data(key), out, rows, tail)
            _, token, done, key, out, rows, tail = jax.lax.while_loop(more, step, loop)
            return out, rows, token, done, jax.random.key_data(key), tail

        caches, tails = DocumentCache.specs(), TailCache.specs()
        make = lambda: self.traced(  # noqa: E731
            body,
            (self.specs, P(), P(), P(), P(), P(), P(), caches, tails),
            (P(), P(), P(), P(), P(), tails),
            donate=(8,),
        )
        args = (state, token, made, done, key, stop, lengths, cache, tail)
        return self.call("decode", (own_decode(method), steps, sampler, with_logits), make, args)

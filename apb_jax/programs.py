"""How device programs are made: the only ``shard_map`` and ``jit``, compiled ahead, counted and kept.

Their bodies are in ``prefill.py`` and ``decode.py``. Global shapes are given in signatures; inside a program every
array is the shard's own part.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from apb_jax.attention.inputs import Kernels, Shard
from apb_jax.attention.layout import Layout
from apb_jax.attention.placement import Placement
from apb_jax.errors import UserError
from apb_jax.mesh import SP, TP
from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import Where
from apb_jax.model.slices import WeightSlices
from apb_jax.model.transformer import Transformer
from apb_jax.precision import Precision
from apb_jax.quantised_cache import AnyCache, cache_dtype, cache_kind
from pallas_kernels.dispatch import record_choices
from pallas_kernels.errors import KernelInputError, Unsupported

Recipe = tuple[str, Any, Callable[[], Any]]
"""A program's name, its static settings, and how the jitted function is made."""
COMPILERS = 8
"""Programs compiled at a time: XLA works without Python's lock."""
ONE_TOKEN = ("decode", "next token", "query logits")
"""Programs without a product of many rows."""
KEPT_PROGRAMS = 128
"""Compiled programs that an engine keeps; the one used longest ago goes first."""


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
    placement: Placement = field(default=Placement(1), metadata={"static": True})
    segments: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})
    """Those of the layout; programs behind the prefill do not depend on them and get none."""

    @classmethod
    def of(cls, layout: Layout, query_tokens: np.ndarray, placement: Placement) -> Lengths:
        """Host arrays of a layout, to be placed on the mesh."""
        lengths = (layout.block_rows, layout.document_tokens, layout.embedded_query_tokens, query_tokens)
        kept = (layout.kept_tokens, layout.kept_positions, layout.tail_position)
        return cls(*lengths, *kept, placement, layout.segments)  # type: ignore[arg-type]

    def shard(self) -> Shard:
        """This shard's view; call inside ``shard_map``, where a device holds several inside ``each_shard``."""
        lengths = (self.block_rows, self.document_tokens, self.embedded_query_tokens, self.query_tokens)
        return Shard(self.placement.index(), *lengths, self.placement, self.segments)

    @property
    def tail_start(self) -> Int[Array, " B"]:
        """Position of the first query token."""
        return self.document_tokens if self.tail_position is None else self.tail_position

    def kept(self, shard: Shard) -> Int[Array, " B"]:
        """Document tokens whose KV this shard keeps."""
        if self.kept_tokens is not None:
            return jnp.take(self.kept_tokens, shard.index, axis=1)
        return jnp.clip(self.document_tokens - shard.index * self.block_rows, 0, self.block_rows)

    def kept_on_device(self) -> Int[Array, "B V"]:
        """Document tokens whose KV each shard of this device keeps."""
        assert self.kept_tokens is not None
        return jnp.take(self.kept_tokens, self.placement.on_device(), axis=1)

    def positions_of(self, shard: Shard) -> Int[Array, "B C"]:
        """Positions of this shard's cache rows."""
        assert self.kept_positions is not None
        return jnp.take(self.kept_positions, shard.index, axis=1)


@dataclass
class Programs:
    """Compiled programs of one model on one mesh, keyed by what they were compiled for."""

    config: ModelConfig
    graph: nnx.GraphDef
    specs: Any
    mesh: Mesh
    kernels: Kernels
    slices: WeightSlices | None = None
    """Given where query and decoding steps use the weights as slices over ``sp``."""
    compiler_options: dict[str, Any] | None = None
    precision: Precision = field(default_factory=Precision)
    compiled: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    choices: dict[str, set[str]] = field(default_factory=dict)
    """Which implementations the ops of all programs so far took."""
    sizes: dict[Any, int] = field(default_factory=dict)
    """Bytes of each program; asking XLA takes milliseconds, so it is asked once."""
    begun: dict[Any, Future[tuple[Any, dict[str, set[str]]]]] = field(default_factory=dict)
    """Programs that are being compiled in the background, until they are called."""
    pool: ThreadPoolExecutor | None = None
    compile_s: float = 0.0
    """Seconds that callers waited for programs."""
    largest: int = 0
    """The most bytes that a program called so far needs on a device, by the compiler's estimate; may be set back."""
    on_compile: Callable[[str], None] | None = None

    def same(self, kernels: Kernels, slices: WeightSlices | None, precision: Precision) -> bool:
        """Whether programs of these settings would be the same ones."""
        return (kernels, slices, precision) == (self.kernels, self.slices, self.precision)

    @property
    def tp_axis(self) -> str | None:
        return TP if self.mesh.shape[TP] > 1 else None

    @property
    def where(self) -> Where:
        """Where the weights are while every device reads all of its own."""
        return Where(self.tp_axis)

    def model(self, state: nnx.State) -> Transformer:
        """The transformer around the local weights."""
        return nnx.merge(self.graph, state)

    def place(self, tree: Any, specs: Any = None) -> Any:
        """Host arrays onto the mesh, replicated unless ``specs`` says otherwise; the same values in every process."""

        def put(x: Any, spec: P) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, spec), lambda index: x[index])

        return jax.tree.map(put, tree, jax.tree.map(lambda _: P(), tree) if specs is None else specs)

    def place_rows(self, rows: np.ndarray, placement: Placement) -> jax.Array:
        """An array [B, N, S] of every shard's rows as [B, N * S] over ``sp``, each shard in its place."""
        placed = rows[:, placement.order_of_rows]
        return self.place(np.ascontiguousarray(placed.reshape(rows.shape[0], -1)), P(None, SP))

    def traced(self, body: Callable[..., Any], in_specs: Any, out_specs: Any, donate: tuple[int, ...] = ()) -> Any:
        """``body`` as a jitted ``shard_map`` over the mesh."""
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def options_of(self, name: str) -> dict[str, Any] | None:
        """Programs of a token multiply in 8 bits in kernels of ours alone; cuBLAS would copy their head in float32."""
        return None if name in ONE_TOKEN else self.compiler_options

    def key(self, name: str, static: Any, args: tuple[Any, ...]) -> Any:
        """What a program is kept under; ``args`` may be ``jax.ShapeDtypeStruct``s."""
        shapes = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(args))
        return (name, static, shapes, jax.tree.structure(args))

    def ahead(self, name: str, static: Any, make: Callable[[], Any], args: tuple[Any, ...]) -> None:
        """Begin to compile in the background; ``call`` waits for it and raises what went wrong.

        ``args``: arrays, or ``jax.ShapeDtypeStruct``s with their shardings.
        """
        key = self.key(name, static, args)
        if key not in self.compiled and key not in self.begun:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(COMPILERS, thread_name_prefix="compile")
            self.begun[key] = self.pool.submit(compiled, make, args, self.options_of(name))

    def call(self, name: str, static: Any, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run program ``name``; compile it first where these static settings and shapes are new."""
        key = self.key(name, static, args)
        if key not in self.compiled:
            if self.on_compile:
                self.on_compile(name)
            begun = self.begun.pop(key, None)
            self.keep(key, (lambda: compiled(make, args, self.options_of(name))) if begun is None else begun.result)
        self.compiled.move_to_end(key)
        self.largest = max(self.largest, self.sizes[key])
        return self.compiled[key](*args)

    def keep(self, key: Any, result: Callable[[], tuple[Any, dict[str, set[str]]]]) -> None:
        """Wait for a program and keep it; the wait is what compilation costs the caller."""
        started = time.perf_counter()
        program, chosen = result()
        self.note_choices(key[0], chosen)
        self.compiled[key] = program
        self.sizes[key] = program_bytes(program)
        self.compile_s += time.perf_counter() - started
        while len(self.compiled) > KEPT_PROGRAMS:
            self.sizes.pop(self.compiled.popitem(last=False)[0])

    def finish(self) -> None:
        """Wait for all programs begun: XLA times its choices on the device, which must do nothing else then."""
        while self.begun:
            key = next(iter(self.begun))
            if self.on_compile:
                self.on_compile(key[0])
            self.keep(key, self.begun.pop(key).result)

    def note_choices(self, name: str, chosen: dict[str, set[str]]) -> None:
        """Keep which implementation each op took; refuse a prefill whose attention is not the one asked for by name."""
        wanted, used = self.kernels.attention, chosen.get("flash_attention", set())
        if name == "prefill" and wanted is not None and (used != {wanted} or "block_sparse_attention" in chosen):
            other = ", ".join(f"{op} ({' and '.join(sorted(names))})" for op, names in sorted(chosen.items()))
            raise UserError(
                f"--kernels {wanted}: not all attention of this prefill goes through flash_attention, which the "
                f"name is for; it uses {other or 'none of the kernels'}; nearest legal choice: --kernels auto"
            )
        if name == "prefill" and self.kernels.eight is not None and (not used or "block_sparse_attention" in chosen):
            other = ", ".join(sorted(chosen)) or "none of the kernels"
            raise UserError(
                f"--attention-dtype fp8: not all attention of this prefill goes through flash_attention, which alone "
                f"has 8-bit products; it uses {other}; nearest legal choice: --attention-dtype model"
            )
        for op, names in chosen.items():
            self.choices.setdefault(op, set()).update(names)

    def count(self, name: str) -> int:
        """Programs of this name that are kept."""
        return sum(key[0] == name for key in self.compiled)

    def zeros(self, kind: type[Any], batch: int, rows: int, dtype: Any, layers: int | None = None) -> Any:
        """An empty cache of this type, of all layers or so many, made on the devices, in its sharding."""
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), kind.specs())
        make = lambda: jax.jit(lambda: kind.zeros(self.config, batch, rows, dtype, layers), out_shardings=shardings)  # noqa: E731
        return self.call(kind.__name__, (batch, rows, dtype, layers), make, ())

    def document_cache(self, batch: int, rows: int, dtype: Any, layers: int | None = None) -> AnyCache:
        """An empty cache of the document in the type that the precision says; ``dtype``: the model's."""
        kv = self.precision.kv
        cache: AnyCache = self.zeros(cache_kind(kv), batch, rows, cache_dtype(kv, dtype), layers)
        return cache


def compiled(
    make: Callable[[], Any], args: tuple[Any, ...], options: dict[str, Any] | None
) -> tuple[Any, dict[str, set[str]]]:
    """(the compiled program, which implementations its ops took)."""
    try:
        with record_choices() as chosen:
            return make().lower(*args).compile(options), chosen
    except (KernelInputError, Unsupported) as error:
        raise UserError(f"--kernels: {error}; nearest legal choice: --kernels auto") from error


def program_bytes(program: Any) -> int:
    """The compiler's estimate of bytes per device: a program's arguments, outputs and temporaries."""
    stats = program.memory_analysis()
    if stats is None:
        return 0
    live = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(live + stats.temp_size_in_bytes)

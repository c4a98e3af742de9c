"""The seam: what an attention method is, what it may say about itself, and what it gets to work with.

A method differs from full attention in which tokens each shard holds (``layout``), what is exchanged and which keys
each row sees (``prefill``), and which KV is kept. Decoding is the same for nearly all: a partial attention per shard
and one merge; a method with its own rule overrides ``decode``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Array, Float

from apb_jax.attention.decode import decode_remapped, decode_sharded
from apb_jax.attention.inputs import Cached, KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout
from apb_jax.model.config import ModelConfig
from apb_jax.rope.string import StringRope


@dataclass(frozen=True)
class Capabilities:
    """What a method can do: read by the engine (to refuse early), the tests (what to skip) and the README table."""

    exact: bool
    paper: str
    needs_scorer: bool = False
    """Ranks keys by retaining heads, or by the query where there are none."""
    needs_heads: bool = False
    """Works with trained retaining heads only."""
    needs_query_in_prefill: bool = False
    max_shards: int | None = None
    max_batch: int | None = None
    remaps_positions: bool = True
    """Whether ``--rope string`` composes with it."""
    true_positions: bool = True
    """Whether prefill scores keys at their true distances, so that its softmax compares with full attention's."""
    selects: bool = False
    """Whether rows see only a selection of what stands in front of them in their own block."""
    tested: tuple[str, ...] = ("exact limit",)
    """Kinds of evidence in tests/: "exact limit", "selection oracle", "recordings", "transformers"."""


@dataclass(frozen=True)
class AttentionMethod(abc.ABC):
    """One way to prefill a long document; the fields of a subclass are the hyper-parameters of its paper."""

    name: ClassVar[str]
    can: ClassVar[Capabilities]

    @classmethod
    def refuse(
        cls,
        config: ModelConfig,
        shards: int,
        batch: int,
        tp: int = 1,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """Why this method cannot serve such a model, mesh or batch at all, with the nearest legal choice; else None.

        Known before any weight is read; what depends on the documents is ``why_not``. ``options``: the fields given.
        """
        can = cls.can
        if can.max_shards is not None and shards > can.max_shards:
            return f"method {cls.name!r} runs on one shard, here are {shards}; nearest legal choice: --sp 1"
        if can.max_batch is not None and batch > can.max_batch:
            return f"method {cls.name!r} takes {can.max_batch} request at a time, not {batch}; send them one by one"
        if not can.remaps_positions and config.rope.kind == "string":
            return (
                f"method {cls.name!r} does not compose with --rope string; "
                "nearest legal choice: the model's own rope, or --method full"
            )
        return None

    def dense_layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        """Layers whose prefill is full attention by the method's settings; all where the method is exact."""
        return tuple(range(config.num_layers)) if self.can.exact else ()

    def why_not(self, prompts: list[Prompt], shards: int) -> str | None:
        """Why these prompts do not fit this method on so many shards, with the numbers; None where they do."""
        return None

    @abc.abstractmethod
    def layout(self, prompts: list[Prompt], shards: int) -> Layout:
        """The rows of every shard."""

    @abc.abstractmethod
    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        """One layer's attention over the local rows and the KV of the block, inside ``shard_map``."""

    def decode(self, x: LayerInputs, cached: Cached, shard: Shard) -> Float[Array, "B M H D"]:
        """One layer's attention of query or generated rows over what was kept; exact by default."""
        if isinstance(x.rope, StringRope):
            return decode_remapped(x, cached, shard)
        return decode_sharded(
            x.rotated()[0],
            cached.document,
            cached.kept_tokens,
            cached.tail,
            cached.tail_offset,
            shard,
            query_tokens=cached.query_tokens,
        )

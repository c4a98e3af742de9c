"""The seam: what an attention method is, what it may say about itself, and what it gets to work with.

A method differs from full attention in which tokens each shard holds (``layout``), what is exchanged and which keys
each row sees (``prefill``), and which KV is kept. Decoding is the same for nearly all: a partial attention per shard
and one merge; a method with its own rule overrides ``decode``.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxtyping import Array, Float

from apb_jax.attention.decode import decode_remapped, decode_sharded
from apb_jax.attention.fields import check_fields
from apb_jax.attention.inputs import Cached, KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout
from apb_jax.model.config import ModelConfig
from apb_jax.rope.string import StringRope

ONE_SHARD = "one shard; --shards 8 splits the document on one device"
"""Why a method that differs from full attention between shards alone comes to it (``AttentionMethod.equals_full``)."""


@dataclass(frozen=True)
class Capabilities:
    """What a method can do: read by its refusals, the measuring, the tests (what to skip) and the table of methods."""

    exact: bool
    paper: str
    needs_scorer: bool = False
    """Ranks keys by retaining heads, or by the query where there are none."""
    needs_heads: bool = False
    """Works with trained retaining heads only."""
    needs_query_in_prefill: bool = False
    gathers: bool = False
    """Whether every shard gathers the whole document's keys, so that the last one has the most work."""
    max_shards: int | None = None
    remaps_positions: bool = True
    """Whether ``--rope string`` composes with it."""
    true_positions: bool = True
    """Whether prefill scores keys at their true distances, so that its softmax compares with full attention's."""
    selects: bool = False
    """Whether rows see only a selection of what stands in front of them in their own block."""
    block_sparse: bool = False
    """Whether its prefill attends through ``block_sparse_attention``, which has no 8-bit products."""
    tested: tuple[str, ...] = ("exact limit",)
    """Kinds of evidence in tests/: "exact limit", "selection oracle", "recordings", "transformers"."""


@dataclass(frozen=True)
class Setup:
    """What a method may know when it is chosen: the model, the mesh and, once they are there, the requests."""

    config: ModelConfig
    model: str
    """Its name: tables of budgets are by model."""
    shards: int
    """Parts of the document."""
    devices: int
    """Places on the sequence axis; each holds equally many shards."""
    tp: int = 1
    batch: int = 1
    has_heads: bool = False
    """Whether the model brings trained retaining heads."""
    query_at: int = 0
    """Where the chat template lets a query be embedded in an anchor: the tokens that open the document."""
    prompts: tuple[Prompt, ...] = ()
    """Empty as long as the documents are not known."""

    @property
    def shortest(self) -> int:
        """Document tokens of the shortest request."""
        return min(len(p.document) for p in self.prompts)

    @property
    def longest(self) -> int:
        """Document tokens of the longest request."""
        return max(len(p.document) for p in self.prompts)


@dataclass(frozen=True)
class AttentionMethod(abc.ABC):
    """One way to prefill a long document; the fields of a subclass are the hyper-parameters of its paper.

    A subclass with a ``__post_init__`` calls this one, which checks the fields' types.
    """

    name: ClassVar[str]
    can: ClassVar[Capabilities]
    shards_alone: ClassVar[int] = 1
    """Shards that a command gives the method on one device: more than 1 where one shard would be full attention."""

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))

    # ---- the choice ------------------------------------------------------------------------------------------------

    @classmethod
    def refuse(cls, setup: Setup, options: Mapping[str, Any]) -> str | None:
        """Why this method cannot serve such a model or mesh at all, with the nearest legal choice; else None.

        Known before any weight is read, so ``setup`` has no prompts; what depends on the documents is ``why_not``.
        ``options``: the fields that were given.
        """
        can = cls.can
        if can.max_shards is not None and setup.shards > can.max_shards:
            legal = "--sp 1" if setup.devices > 1 else "--shards 1"
            return f"method {cls.name!r} runs on one shard, here are {setup.shards}; nearest legal choice: {legal}"
        if not can.remaps_positions and setup.config.rope.kind == "string":
            return (
                f"method {cls.name!r} does not compose with --rope string; "
                "nearest legal choice: the model's own rope, or --method full"
            )
        if can.needs_heads and not setup.has_heads:
            return f"method {cls.name!r} needs retaining heads and {setup.model} has none; give --heads FILE"
        return None

    @classmethod
    def for_request(cls, setup: Setup, options: Mapping[str, Any]) -> Self:
        """The method with every hyper-parameter decided for the prompts of ``setup``.

        ``options``: the fields given, or of the model's own table; they stay as they are. By default the others are the
        fields' defaults.
        """
        return cls(**options)

    def completed(self, setup: Setup) -> tuple[Self, tuple[str, ...]]:
        """(the method with what only the engine knows filled in, notes for the user)."""
        return self, ()

    def why_not(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """Why these prompts do not fit this method on so many shards, with the numbers; None where they do."""
        return None

    def equals_full(self, prompts: Sequence[Prompt], shards: int) -> str | None:
        """Why an approximate method is full attention for these prompts; None where it is not, or where it is exact."""
        return None

    def batch_key(self, prompt: Prompt, shards: int) -> Hashable:
        """What requests must have in common, beside this method, for a batch of them to be each one alone.

        By default nothing: no row sees how long other requests are.
        """
        return None

    def dense_layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        """Layers whose prefill is full attention by the method's settings; all where the method is exact."""
        return tuple(range(config.num_layers)) if self.can.exact else ()

    # ---- the work --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        """The rows of every shard."""

    def visible_keys(self, layout: Layout, shard: int) -> dict[str, int]:
        """Keys that the rows of a shard's block may see in prefill, by kind and in order, for the first request.

        Kinds: "earlier" (blocks before it), "passing", the layout's segments, "block".
        """
        block, prefix = int(layout.block_rows[0]), dict(layout.segments[:-1])
        if self.can.exact or (self.can.selects and not prefix):
            return {"earlier": shard * block, "block": block}
        return (prefix if shard else {}) | {"block": block}

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

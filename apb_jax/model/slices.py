"""Decoding on the prefill's mesh: replicated weights used as tensor-parallel slices over the sequence axis.

A decoding step is bound by reading the weights, and every device of the sequence axis holds all of them. If each reads
only its 1 / N of every matrix, the step costs two more small reductions and one gather a layer, and 1 / N of the bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.model.weights import weights_of

WIDTHS = {"QD": "query columns", "KD": "KV columns", "M": "FFN columns", "V": "vocabulary entries"}
"""The table's letters in words."""


@dataclass(frozen=True)
class WeightSlices:
    """Member i of ``count`` on mesh axis ``axis`` uses slice i of every matrix; call inside ``shard_map``."""

    axis: str
    count: int

    @staticmethod
    def why_not(config: ModelConfig, count: int, tp: int = 1) -> str | None:
        """Which of the model's widths ``count`` devices cannot share evenly; None where they can."""
        sizes = config.sizes()
        widths = {
            weight.split: sizes[weight.split] // tp
            for weight in weights_of(config.facts)
            if weight.split and weight.kind in ("matrix", "head")
        }
        if config.tie_embeddings:
            widths["V"] = sizes["V"]  # the embedding is the head, and is not split over tp
        for letter, width in widths.items():
            if width % count:
                return f"{count} devices do not divide the {width} {WIDTHS[letter]}"
        return None

    @classmethod
    def over(cls, config: ModelConfig, axis: str, count: int, tp: int = 1) -> WeightSlices | None:
        """Slices for ``count`` devices on ``axis``, None for one; UserError for widths that they cannot share."""
        reason = cls.why_not(config, count, tp)
        if reason is not None:
            legal = next(n for n in range(count - 1, 0, -1) if cls.why_not(config, n, tp) is None)
            raise UserError(f"--slice-decode: {reason} of the model; nearest legal choice: --sp {legal}")
        return cls(axis, count) if count > 1 else None

    def part(self, a: Float[Array, "..."], dim: int) -> Float[Array, "..."]:
        """This member's slice of dimension ``dim``."""
        size = a.shape[dim] // self.count
        return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index(self.axis) * size, size, dim)

    def whole(self, parts: Sequence[Float[Array, "B S n"]]) -> list[Float[Array, "B S m"]]:
        """The last dimensions of several arrays put together from all members' slices, by one ``all_gather``."""
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + part.shape[-1])
        everything = jax.lax.all_gather(jnp.concatenate(parts, axis=-1), self.axis, axis=2)  # [B, S, N, sum of n]
        pieces = [everything[..., a:b] for a, b in itertools.pairwise(ends)]
        return [piece.reshape(*piece.shape[:2], -1) for piece in pieces]

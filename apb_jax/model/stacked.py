"""Matrices left in the stack of all layers: a decoding step reads them where they lie, without slicing them first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from apb_jax.model.weights import MATRICES

FEW_ROWS = 64
"""Rows up to which reading the matrices outweighs multiplying with them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedMatrix:
    """The matrix of one layer, not sliced from its stack; in 8 bits [L, O, I]."""

    stack: Float[Array, "L I O"]
    layer: Int[Array, ""]


def one_layer(layer: Int[Array, ""], in_place: bool, path: tuple[Any, ...], weight: Array) -> Array | StackedMatrix:
    """The ``layer``-th of a stacked weight; ``in_place``: a projection stays in its stack."""
    if in_place and path[0].key in MATRICES:
        return StackedMatrix(weight, layer)
    return jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)

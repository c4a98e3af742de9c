"""Matrices left in the stack of all layers: a decoding step reads them where they lie, without slicing them first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from apb_jax.model.slices import WeightSlices
from apb_jax.model.weights import MATRICES
from pallas_kernels.skinny_matmul import skinny_matmul

FEW_ROWS = 64
"""Rows up to which reading the matrices outweighs multiplying with them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedMatrix:
    """The matrix of one layer, not sliced from its stack."""

    stack: Float[Array, "L I O"]
    layer: Int[Array, ""]


def one_layer(layer: Int[Array, ""], in_place: bool, path: tuple[Any, ...], weight: Array) -> Array | StackedMatrix:
    """The ``layer``-th of a stacked weight; ``in_place``: a projection stays in its stack."""
    if in_place and path[0].key in MATRICES:
        return StackedMatrix(weight, layer)
    return jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False)


def multiply(
    x: Float[Array, "B S I"], matrices: Sequence[StackedMatrix], slices: WeightSlices | None, *, rows: bool
) -> list[Float[Array, "B S O"]]:
    """``x`` times each matrix, in the dtype of ``x``; with ``slices`` this member's columns, or ``rows``, of each."""
    share = (jax.lax.axis_index(slices.axis), slices.count) if slices else None
    products = skinny_matmul(
        x.reshape(-1, x.shape[-1]), [matrix.stack for matrix in matrices], matrices[0].layer,
        row_share=share if rows else None, column_share=None if rows else share,
    )  # fmt: skip
    return [product.astype(x.dtype).reshape(*x.shape[:-1], -1) for product in products]

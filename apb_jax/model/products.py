"""Rows times the matrices of a layer: whole or sliced, where they lie or in the model's dtype or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apb_jax.model.slices import WeightSlices
from apb_jax.model.stacked import StackedMatrix
from apb_jax.precision import precision_of
from pallas_kernels.float8 import product, quantise
from pallas_kernels.skinny_matmul import skinny_matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix in e4m3, output-major, with one float32 scale an output: values[o] * scale[o] is its column o."""

    values: Float[Array, "O I"] | StackedMatrix
    scale: Float[Array, " O"]


Matrix = Float[Array, "I O"] | StackedMatrix | Fp8Matrix


def project(x: Float[Array, "B S I"], weight: Float[Array, "I O"]) -> Float[Array, "B S O"]:
    """x @ weight, written in the dtype of x; float32 inputs are multiplied as float32 (no TF32).

    Matrix units add up in float32 whatever they write; asking for a float32 result here would write that to memory.
    """
    return jnp.matmul(x, weight, precision=precision_of(x.dtype), preferred_element_type=x.dtype)


def project_all(
    x: Float[Array, "B S I"], matrices: Sequence[Matrix], slices: WeightSlices | None, *, rows: bool = False
) -> list[Float[Array, "B S O"]]:
    """``x`` times each matrix, in the dtype of ``x``; with ``slices`` this member's columns, or ``rows``, of each.

    The matrices are all of one kind. Those in 8 bits multiply the rows of ``x`` quantised once for all of them.
    """
    values = [matrix.values if isinstance(matrix, Fp8Matrix) else matrix for matrix in matrices]
    stacks = [one for one in values if isinstance(one, StackedMatrix)]
    arrays = [one for one in values if not isinstance(one, StackedMatrix)]
    scales = [_scale(matrix, slices, rows) for matrix in matrices if isinstance(matrix, Fp8Matrix)]
    if not stacks and not scales:
        return [project(x, slices.part(array, 0 if rows else 1) if slices else array) for array in arrays]
    flat = x.reshape(-1, x.shape[-1])
    products = _in_place(flat, stacks, slices, rows) if stacks else _quantised(flat, arrays, slices, rows)
    if scales:
        products = [one.astype(jnp.float32) * scale for one, scale in zip(products, scales, strict=True)]
    return [one.astype(x.dtype).reshape(*x.shape[:-1], -1) for one in products]


def _quantised(
    x: Float[Array, "R I"], matrices: Sequence[Float[Array, "O I"]], slices: WeightSlices | None, rows: bool
) -> list[Float[Array, "R O"]]:
    """Without the scales of the matrices; float32 here, which XLA does not write to memory."""
    values, scale = quantise(x)
    parts = [slices.part(matrix, 1 if rows else 0) if slices else matrix for matrix in matrices]
    return [product(values, part, x.dtype).astype(jnp.float32) * scale for part in parts]


def _in_place(
    x: Float[Array, "R I"], matrices: Sequence[StackedMatrix], slices: WeightSlices | None, rows: bool
) -> list[Float[Array, "R O"]]:
    share = (jax.lax.axis_index(slices.axis), slices.count) if slices else None
    return list(
        skinny_matmul(
            x, [matrix.stack for matrix in matrices], matrices[0].layer,
            row_share=share if rows else None, column_share=None if rows else share,
        )
    )  # fmt: skip


def _scale(matrix: Fp8Matrix, slices: WeightSlices | None, rows: bool) -> Float[Array, " O"]:
    return slices.part(matrix.scale, 0) if slices and not rows else matrix.scale

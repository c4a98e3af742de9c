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

    Matrices in 8 bits multiply the rows of ``x`` quantised once for all of them.
    """
    first = matrices[0]
    if isinstance(first, StackedMatrix) or (isinstance(first, Fp8Matrix) and isinstance(first.values, StackedMatrix)):
        return _in_place(x, matrices, slices, rows)
    if isinstance(first, Fp8Matrix):
        return _quantised(x, matrices, slices, rows)
    return [project(x, slices.part(matrix, 0 if rows else 1) if slices else matrix) for matrix in matrices]


def _quantised(
    x: Float[Array, "B S I"], matrices: Sequence[Matrix], slices: WeightSlices | None, rows: bool
) -> list[Float[Array, "B S O"]]:
    values, scale = quantise(x.reshape(-1, x.shape[-1]))
    out = []
    for matrix in matrices:
        assert isinstance(matrix, Fp8Matrix)
        weight = slices.part(matrix.values, 1 if rows else 0) if slices else matrix.values
        plain = product(values, weight, x.dtype)
        scaled = plain.astype(jnp.float32) * scale * _scale(matrix, slices, rows)
        out.append(scaled.astype(x.dtype).reshape(*x.shape[:-1], -1))
    return out


def _in_place(
    x: Float[Array, "B S I"], matrices: Sequence[Matrix], slices: WeightSlices | None, rows: bool
) -> list[Float[Array, "B S O"]]:
    share = (jax.lax.axis_index(slices.axis), slices.count) if slices else None
    stacks = [matrix.values if isinstance(matrix, Fp8Matrix) else matrix for matrix in matrices]
    products = skinny_matmul(
        x.reshape(-1, x.shape[-1]), [stack.stack for stack in stacks], stacks[0].layer,
        row_share=share if rows else None, column_share=None if rows else share,
    )  # fmt: skip
    scaled = [
        plain * _scale(matrix, slices, rows) if isinstance(matrix, Fp8Matrix) else plain
        for plain, matrix in zip(products, matrices, strict=True)
    ]
    return [one.astype(x.dtype).reshape(*x.shape[:-1], -1) for one in scaled]


def _scale(matrix: Fp8Matrix, slices: WeightSlices | None, rows: bool) -> Float[Array, " O"]:
    return slices.part(matrix.scale, 0) if slices and not rows else matrix.scale

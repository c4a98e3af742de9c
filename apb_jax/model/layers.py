"""The decoder layer: RMSNorm, grouped-query attention around an exchangeable attention function, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import LayerInputs
from apb_jax.model.config import LayerSpec, ModelConfig
from apb_jax.model.heads import FoldedRetainingHead, RetainingHead
from apb_jax.model.products import Fp8Matrix, Matrix, project, project_all
from apb_jax.model.slices import WeightSlices
from apb_jax.model.weights import LAYERS, QUANTISED, head_facts, weights_of
from apb_jax.rope.base import Rope
from pallas_kernels.float8 import quantise

CHUNK_ROWS = 8192
"""Rows that go through the products behind the attention at once: enough for the matrix units, few in memory."""
Attend = Callable[[LayerInputs, Any], tuple[Float[Array, "B S H D"], Any]]
"""(inputs, carry) -> (attention output before o_proj, carry): the carry holds the KV cache."""


@dataclass(frozen=True)
class Where:
    """How the weights lie on the mesh and are read there."""

    tp_axis: str | None = None
    """The mesh axis that heads and FFN columns are split over."""
    slices: WeightSlices | None = None
    """Each device of their axis reads its part of every matrix only (see ``model/slices.py``)."""
    in_place: bool = False
    """Matrices are multiplied where they lie in their stacks, where the rows are few."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which a layer's two products are summed."""
        return tuple(axis for axis in (self.slices.axis if self.slices else None, self.tp_axis) if axis)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a call stand, and how layers of one kind rotate them."""

    positions: Int[Array, "B S"]
    cos: Float[Array, "B S Dhalf"]
    sin: Float[Array, "B S Dhalf"]
    rope: Rope


def rms_norm(x: Float[Array, "*rows E"], weight: Float[Array, " E"], eps: float) -> Float[Array, "*rows E"]:
    """Normalised in float32, cast back, then scaled (the order of transformers' LlamaRMSNorm)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def over_chunks(function: Callable[..., Float[Array, "1 R E"]], x: Float[Array, "B S E"], *others: Array) -> Array:
    """``function`` of rows of ``x`` and ``others``, CHUNK_ROWS or fewer at a time, written into ``x``.

    What a row's products need in between then exists for one chunk, however long the document is.
    """
    rows = x.shape[0] * x.shape[1]
    least = -(-rows // CHUNK_ROWS)
    if least == 1:
        return function(x, *others)
    count = next((n for n in range(least, 4 * least) if rows % n == 0), least)
    size = rows // count if rows % count == 0 else CHUNK_ROWS
    flat, *rest = (a.reshape(1, rows, *a.shape[2:]) for a in (x, *others))

    def part(start: Array | int, size: int, whole: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(whole, start, size, axis=1)

    def step(i: Array, whole: Array) -> Array:
        new = function(part(i * size, size, whole), *(part(i * size, size, a) for a in rest))
        return jax.lax.dynamic_update_slice_in_dim(whole, new, i * size, axis=1)

    whole_chunks = rows // size
    flat = jax.lax.fori_loop(0, whole_chunks, step, flat)
    if rest_rows := rows - whole_chunks * size:
        start = whole_chunks * size
        new = function(part(start, rest_rows, flat), *(part(start, rest_rows, a) for a in rest))
        flat = jax.lax.dynamic_update_slice_in_dim(flat, new, start, axis=1)
    return flat.reshape(x.shape)


class DecoderLayers(nnx.Module):
    """All decoder layers, each weight of the table stacked on a leading layer axis; matrices are [L, in, out]."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> nnx.Param:
            """A weight of the table."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        retaining_hidden: int | None,
        dtype: Any,
        rngs: nnx.Rngs,
        folded_heads: bool = False,
        fp8: bool = False,
    ) -> None:
        self.config = config
        sizes = config.sizes(retaining_hidden)
        for weight in weights_of(config.facts | head_facts(retaining_hidden, folded_heads)):
            if not weight.stacked:
                continue
            initial = weight.initial((config.num_layers, *weight.shape(sizes)), rngs.params, dtype)
            if fp8 and weight.path in QUANTISED:
                for row, array in zip(QUANTISED[weight.path], quantise(initial.swapaxes(-1, -2)), strict=True):
                    setattr(self, row.name, nnx.Param(array[..., 0] if row.kind == "scale" else array))
            else:
                setattr(self, weight.name, nnx.Param(initial))

    def matrices(self, *names: str) -> list[Matrix]:
        """Projections of this module's layer slice, in 8 bits where the model holds them so."""
        if hasattr(self, names[0]):
            return [getattr(self, name).get_value() for name in names]
        rows = [[getattr(self, row.name).get_value() for row in QUANTISED[LAYERS + name]] for name in names]
        return [Fp8Matrix(values, scale) for values, scale in rows]

    def retaining_head(self, h: Float[Array, "B S E"]) -> RetainingHead | FoldedRetainingHead | None:
        """The heads of this module's layer slice (None: the model has none); ``h``: what q, k, v are made from."""
        if not hasattr(self, "fc2"):
            return None
        if hasattr(self, "fc1_folded"):
            hidden = project(h, self.fc1_folded[...])
            hidden = hidden + self.fc1_bias[...] if self.config.qkv_bias else hidden
            return FoldedRetainingHead(hidden, self.fc2[...])
        return RetainingHead(self.fc1_q[...], self.fc1_k[...], self.fc1_v[...], self.fc2[...])

    def __call__(
        self,
        x: Float[Array, "B S E"],
        rows: Rows,
        layer: Int[Array, ""],
        spec: LayerSpec,
        attend: Attend,
        carry: Any,
        where: Where,
    ) -> tuple[Float[Array, "B S E"], Any]:
        """Layer number ``layer``, which is ``spec``, on a module whose weights were sliced to that layer.

        Two ``psum`` over the axes of ``where``.
        """
        slices, axes, eps = where.slices, where.axes, self.config.rms_norm_eps

        def heads(y: Float[Array, "B S O"]) -> Float[Array, "B S heads D"]:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        def reduce(y: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
            return jax.lax.psum(y, axes) if axes else y

        with jax.named_scope("qkv"):
            h = rms_norm(x, self.attention_norm[...], eps)
            q, k, v = project_all(h, self.matrices("q", "k", "v"), slices)
            q, k, v = slices.whole([q, k, v]) if slices else (q, k, v)
            if self.config.qkv_bias:
                q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
            q, k, v = heads(q), heads(k), heads(v)
            if spec.qk_norm:
                q, k = rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)
        with jax.named_scope("attention"):
            inputs = LayerInputs(
                q, k, v, rows.cos, rows.sin, layer, self.retaining_head(h), rows.positions, rows.rope, where.tp_axis
            )
            out, carry = attend(inputs, carry)

        def behind_attention(x: Float[Array, "B S E"], flat: Float[Array, "B S HD"]) -> Float[Array, "B S E"]:
            with jax.named_scope("o_proj"):
                flat = slices.part(flat, 2) if slices else flat
                x = x + reduce(*project_all(flat, self.matrices("o"), slices, rows=True))
            with jax.named_scope("mlp"):
                h = rms_norm(x, self.mlp_norm[...], eps)
                gate, up = project_all(h, self.matrices("gate", "up"), slices)
                return x + reduce(*project_all(jax.nn.silu(gate) * up, self.matrices("down"), slices, rows=True))

        return over_chunks(behind_attention, x, out.reshape(*out.shape[:2], -1)), carry

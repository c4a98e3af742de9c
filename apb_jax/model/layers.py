"""The decoder layer: RMSNorm, grouped-query attention around an exchangeable attention function, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import LayerInputs
from apb_jax.model.config import ModelConfig
from apb_jax.model.heads import FoldedRetainingHead, RetainingHead
from apb_jax.model.slices import WeightSlices
from apb_jax.model.stacked import StackedMatrix, multiply

Attend = Callable[[LayerInputs, Any], tuple[Float[Array, "B S H D"], Any]]
"""(inputs, carry) -> (attention output before o_proj, carry): the carry holds the KV cache."""


def rms_norm(x: Float[Array, "*rows E"], weight: Float[Array, " E"], eps: float) -> Float[Array, "*rows E"]:
    """Normalised in float32, cast back, then scaled (the order of transformers' LlamaRMSNorm)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def project(x: Float[Array, "B S I"], weight: Float[Array, "I O"]) -> Float[Array, "B S O"]:
    """x @ weight accumulated in float32, in the dtype of x; float32 inputs are multiplied as float32 (no TF32)."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, weight, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def project_all(
    x: Float[Array, "B S I"], weights: Sequence[nnx.Param], slices: WeightSlices | None, *, rows: bool = False
) -> list[Float[Array, "B S O"]]:
    """``project`` with each of ``weights``; with ``slices`` with this member's columns, or ``rows``, of each."""
    matrices = [weight.get_value() for weight in weights]
    if isinstance(matrices[0], StackedMatrix):
        return multiply(x, matrices, slices, rows=rows)
    return [project(x, slices.part(matrix, 0 if rows else 1) if slices else matrix) for matrix in matrices]


class DecoderLayers(nnx.Module):
    """All decoder layers, each weight stacked on a leading layer axis; matrices are input-major ([L, in, out])."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        retaining_hidden: int | None,
        dtype: Any,
        rngs: nnx.Rngs,
        folded_heads: bool = False,
    ) -> None:
        n, e, f = config.num_layers, config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def matrix(rows: int, columns: int) -> nnx.Param:
            scale = jnp.asarray(rows**-0.5, dtype)
            return nnx.Param(jax.random.normal(rngs.params(), (n, rows, columns), dtype) * scale)

        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((n, e), dtype))
        self.q, self.k, self.v, self.o = matrix(e, q), matrix(e, kv), matrix(e, kv), matrix(q, e)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((n, q), dtype))
            self.k_bias = nnx.Param(jnp.zeros((n, kv), dtype))
            self.v_bias = nnx.Param(jnp.zeros((n, kv), dtype))
        self.mlp_norm = nnx.Param(jnp.ones((n, e), dtype))
        self.gate, self.up, self.down = matrix(e, f), matrix(e, f), matrix(f, e)
        if retaining_hidden and folded_heads:
            self.fc1_folded = matrix(e, retaining_hidden)
            if config.qkv_bias:
                self.fc1_bias = nnx.Param(jnp.zeros((n, retaining_hidden), dtype))
        elif retaining_hidden:
            self.fc1_q, self.fc1_k, self.fc1_v = (matrix(w, retaining_hidden) for w in (q, kv, kv))
        if retaining_hidden:
            self.fc2 = matrix(retaining_hidden, config.num_kv_heads)

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
        cos: Float[Array, "B S Dhalf"],
        sin: Float[Array, "B S Dhalf"],
        positions: Int[Array, "B S"],
        layer: Int[Array, ""],
        attend: Attend,
        carry: Any,
        tp_axis: str | None,
        slices: WeightSlices | None = None,
    ) -> tuple[Float[Array, "B S E"], Any]:
        """One layer on a module whose weights were sliced to that layer; two ``psum`` over ``tp_axis`` if given.

        With ``slices`` each device of their axis multiplies its part of every matrix (see ``model/slices.py``).
        """
        axes = tuple(axis for axis in (slices.axis if slices else None, tp_axis) if axis)

        def heads(y: Float[Array, "B S O"]) -> Float[Array, "B S heads D"]:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim)

        def reduce(y: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
            return jax.lax.psum(y, axes) if axes else y

        with jax.named_scope("qkv"):
            h = rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps)
            q, k, v = project_all(h, (self.q, self.k, self.v), slices)
            q, k, v = slices.whole([q, k, v]) if slices else (q, k, v)
            if self.config.qkv_bias:
                q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        with jax.named_scope("attention"):
            inputs = LayerInputs(
                heads(q), heads(k), heads(v), cos, sin, layer, self.retaining_head(h), positions, self.config.rope,
                tp_axis,
            )  # fmt: skip
            out, carry = attend(inputs, carry)
        with jax.named_scope("o_proj"):
            flat = out.reshape(*out.shape[:2], -1)
            flat = slices.part(flat, 2) if slices else flat
            x = x + reduce(*project_all(flat, (self.o,), slices, rows=True))
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
            gate, up = project_all(h, (self.gate, self.up), slices)
            x = x + reduce(*project_all(jax.nn.silu(gate) * up, (self.down,), slices, rows=True))
        return x, carry

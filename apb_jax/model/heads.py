"""Retaining heads: a small MLP per layer that says which tokens later shards should see.

score = fc2(silu(fc1(concat(q, k, v)))) on q, k, v before RoPE; one value per token and KV head (Locret, arXiv
2410.01805; APB, arXiv 2502.12085). fc1 is kept as its three column groups, so that tensor parallelism can split each by
heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from apb_jax.precision import precision_of


def _product(x: Float[Array, "B S I"], weight: Float[Array, "I O"]) -> Float[Array, "B S O"]:
    """x @ weight, float32."""
    return jnp.matmul(x, weight, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RetainingHead:
    """Weights of one layer: fc1_q [H*D, F], fc1_k and fc1_v [K*D, F], fc2 [F, K]: input-major, local heads."""

    fc1_q: Float[Array, "HD F"]
    fc1_k: Float[Array, "KD F"]
    fc1_v: Float[Array, "KD F"]
    fc2: Float[Array, "F K"]

    def hidden(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        tp_axis: str | None = None,
    ) -> Float[Array, "B S F"]:
        """fc1(concat(q, k, v)) before the activation; one ``psum`` over ``tp_axis`` where heads are split over it."""
        flat = [x.reshape(*x.shape[:2], -1) for x in (q, k, v)]
        weights = (self.fc1_q, self.fc1_k, self.fc1_v)
        out = jnp.asarray(sum(_product(x, w) for x, w in zip(flat, weights, strict=True)))
        return (jax.lax.psum(out, tp_axis) if tp_axis else out).astype(q.dtype)

    def scores(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"]
    ) -> Float[Array, "B S K"]:
        """Raw scores without pooling or masks, float32: what the training fits."""
        return _product(jax.nn.silu(self.hidden(q, k, v)), self.fc2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FoldedRetainingHead:
    """The same head with fc1 folded into the projections: its hidden values come from the layer's input directly.

    ``folded``: [B, S, F] = x fc1_folded (+ fc1_bias), whole on every device of ``tp``; fc2 as above.
    """

    folded: Float[Array, "B S F"]
    fc2: Float[Array, "F K"]

    def hidden(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K D"],
        tp_axis: str | None = None,
    ) -> Float[Array, "B S F"]:
        """What ``RetainingHead.hidden`` gives, up to rounding; q, k, v and ``tp_axis`` are not needed."""
        return self.folded

    def scores(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"]
    ) -> Float[Array, "B S K"]:
        """Raw scores without pooling or masks, float32."""
        return _product(jax.nn.silu(self.folded), self.fc2)

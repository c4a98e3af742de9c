"""Logits of a loaded model with plain causal attention: what parity tests compare."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from apb_jax.attention.inputs import LayerInputs
from apb_jax.weights.checkpoint import LoadedModel


def dense_attention(x: LayerInputs, carry: Any) -> tuple[Array, Any]:
    """Causal attention over the given rows alone, float32."""
    q, k = x.rotated()
    batch, rows, heads, dim = q.shape
    grouped = q.reshape(batch, rows, k.shape[2], -1, dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", grouped, k, precision="highest") * dim**-0.5
    seen = jnp.tril(jnp.ones((rows, rows), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgst,btkd->bskgd", weights, x.v, precision="highest")
    return out.reshape(batch, rows, heads, dim), carry


def our_logits(model: LoadedModel, *prompts: Array | np.ndarray) -> list[np.ndarray]:
    """float32 [1, S, V] for every prompt [1, S]."""
    module = nnx.merge(model.graph(), model.place(None))

    @nnx.jit
    def run(module: Any, tokens: Array) -> Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x, _ = module.run_layers(module.embed(tokens), positions, dense_attention, jnp.int32(0))
        return module.logits(x)

    return [np.asarray(run(module, jnp.asarray(tokens))) for tokens in prompts]

"""Folding of retaining heads: fc1 acts on W_qkv x (+ bias), before RoPE, so fc1 W_qkv is one matrix that acts on x.

The scorer's first product, over (H + 2K) * D columns, becomes one over the hidden size, beside the QKV products; under
tensor parallelism its ``psum`` disappears. Products are formed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from apb_jax.model.config import ModelConfig
from apb_jax.model.weights import WEIGHTS

FOLDED = tuple(weight.path for weight in WEIGHTS if "folded" in weight.needs)


def why_not(config: ModelConfig) -> str | None:
    """Why retaining heads of this model cannot be folded; None where they can."""
    if "qk_norm" in config.facts:
        return (
            "its q and k are normalised between the projections and the heads, so that the two matrices have no "
            "common product"
        )
    return None


def fold(
    arrays: Mapping[str, jax.Array], shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """``fc1_folded`` [L, E, F] (and ``fc1_bias`` [L, F] where q, k, v have biases), layer by layer on the devices.

    ``arrays`` holds the projections, their biases and the unfolded fc1; ``shapes``, ``shardings``: of the results too.
    """
    names = [path for path in FOLDED if path in shapes]
    weights = {part: (arrays[f"layers.{part}"], arrays[f"layers.fc1_{part}"]) for part in "qkv"}
    biases = {part: arrays[f"layers.{part}_bias"] for part in "qkv"} if FOLDED[1] in names else {}

    def one_layer(inputs: tuple[Any, Any]) -> dict[str, jax.Array]:
        pairs, bias = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        out = {FOLDED[0]: sum(_product(matrix, fc1) for matrix, fc1 in pairs.values())}
        if bias:
            out[FOLDED[1]] = sum(_product(bias[part], pairs[part][1]) for part in "qkv")
        return {path: jnp.asarray(x).astype(shapes[path].dtype) for path, x in out.items()}

    run = jax.jit(
        lambda inputs: jax.lax.map(one_layer, inputs), out_shardings={path: shardings[path] for path in names}
    )
    return run((weights, biases))


def _product(x: Any, y: Any) -> Any:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

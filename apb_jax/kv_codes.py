"""Keys and values in 8 bits: e4m3 or int8 codes with one float32 scale for each token and KV head.

A scale of its own for every token needs no statistics beforehand, and a row is quantised once, when it is written.
Which code loses less is measured in ``docs/numerics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@dataclass(frozen=True)
class Code:
    """An 8-bit type and the largest magnitude that it is used for."""

    dtype: Any
    largest: float
    capability: tuple[int, int]
    """The least compute capability of an NVIDIA GPU that converts it."""


CODES = {
    "fp8": Code(jnp.dtype(jnp.float8_e4m3fn), 448.0, (8, 9)),
    "int8": Code(jnp.dtype(jnp.int8), 127.0, (8, 0)),
}
"""By the word of ``Precision.kv``."""
SCALE_BYTES = 4
SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)
"""Scales never are 0: a row of zeros has this one."""


def code_of(dtype: Any) -> Code:
    """The code with this dtype."""
    return next(code for code in CODES.values() if code.dtype == dtype)


def quantise(x: Float[Array, "*rows D"], code: Code) -> tuple[Shaped[Array, "*rows D"], Float[Array, "*rows"]]:
    """(codes, scales) of rows: a value is its code times its row's scale, the largest of a row ``code.largest``."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1) / code.largest, SMALLEST_SCALE)
    # Beyond its range e4m3 has NaN and an integer wraps: rounding of the quotient must not lead there.
    scaled = jnp.clip(wide / scale[..., None], -code.largest, code.largest)
    scaled = jnp.round(scaled) if jnp.issubdtype(code.dtype, jnp.integer) else scaled
    return scaled.astype(code.dtype), scale


def dequantise(codes: Shaped[Array, "*rows D"], scale: Float[Array, "*rows"], dtype: Any) -> Float[Array, "*rows D"]:
    """The values that codes stand for; ``dtype`` rounds the product."""
    return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)

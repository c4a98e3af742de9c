"""Keys and values as they travel between shards: side by side, or as 8-bit codes with their scales, in one array.

What travels in 8 bits is used as it arrives, rounded: every shard, its owner too, sees the same passing block and
anchor. A shard's own block is attended to unrounded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from apb_jax.kv_codes import CODES, Code, dequantise, quantise

Packed = Shaped[Array, "B R K E"]
"""E = 2 D values of the model's dtype, or 2 D + 8 bytes."""


def pack(k: Float[Array, "B R K D"], v: Float[Array, "B R K D"], kv: str) -> Packed:
    """K and V in one array; ``kv``: the word of ``Precision.kv``."""
    if kv not in CODES:
        return jnp.concatenate([k, v], axis=-1)
    return jnp.concatenate([_as_bytes(k, CODES[kv]), _as_bytes(v, CODES[kv])], axis=-1)


def unpack(packed: Packed, kv: str, dtype: Any) -> tuple[Float[Array, "B R K D"], Float[Array, "B R K D"]]:
    """K and V again, in ``dtype``."""
    k, v = jnp.split(packed, 2, axis=-1)
    return (k, v) if kv not in CODES else (_of_bytes(k, CODES[kv], dtype), _of_bytes(v, CODES[kv], dtype))


def _as_bytes(x: Float[Array, "B R K D"], code: Code) -> UInt8[Array, "B R K D+4"]:
    codes, scale = quantise(x, code)
    bits = jax.lax.bitcast_convert_type
    return jnp.concatenate([bits(codes, jnp.uint8), bits(scale, jnp.uint8)], axis=-1)


def _of_bytes(packed: UInt8[Array, "B R K D+4"], code: Code, dtype: Any) -> Float[Array, "B R K D"]:
    bits = jax.lax.bitcast_convert_type
    return dequantise(bits(packed[..., :-4], code.dtype), bits(packed[..., -4:], jnp.float32), dtype)

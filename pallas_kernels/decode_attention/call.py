"""One validated call of decode_attention."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError


@dataclass(frozen=True)
class DecodeCall:
    """q [B, M, H, D], k and v [B, T, K, D], lengths int32 [B], causal_offset None or int32 [B]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    causal_offset: jax.Array | None
    scale: float

    def __post_init__(self) -> None:
        q, k = self.q, self.k
        if q.ndim != 4:
            raise KernelInputError(f"q has shape {q.shape}; it must be [B, M, H, D]")
        if k.ndim != 4 or k.shape != self.v.shape or k.shape[::3] != q.shape[::3]:
            raise KernelInputError(f"k {k.shape} and v {self.v.shape} must both be [B, T, K, D] with q {q.shape}")
        if q.shape[2] % k.shape[2]:
            raise KernelInputError(f"{k.shape[2]} KV heads do not divide {q.shape[2]} query heads")
        if not q.dtype == k.dtype == self.v.dtype:
            raise KernelInputError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {self.v.dtype}; they must agree")

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """First key and end of each row's interval, int32 [B, M]."""
        batch, rows = self.q.shape[:2]
        stop = jnp.broadcast_to(self.lengths[:, None], (batch, rows))
        if self.causal_offset is not None:
            stop = jnp.minimum(stop, self.causal_offset[:, None] + jnp.arange(1, rows + 1, dtype=jnp.int32))
        return jnp.zeros_like(stop), stop


def _per_batch(value: jax.Array | int, batch: int, name: str) -> jax.Array:
    array = jnp.asarray(value, jnp.int32)
    if array.shape not in ((), (batch,)):
        raise KernelInputError(f"{name} has shape {array.shape}; it must be ({batch},)")
    return jnp.broadcast_to(array, (batch,))


def make_call(q, k, v, lengths, causal_offset, scale) -> DecodeCall:
    """Validate, clip the lengths to T, and let all arrays vary over the same mesh axes."""
    lengths = jnp.clip(_per_batch(lengths, q.shape[0], "lengths"), 0, k.shape[1])
    if causal_offset is not None:
        causal_offset = _per_batch(causal_offset, q.shape[0], "causal_offset")
    q, k, v, lengths, causal_offset = vary_together((q, k, v, lengths, causal_offset))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return DecodeCall(q, k, v, lengths, causal_offset, scale)

"""One validated call of flash_attention, as the implementations see it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError
from pallas_kernels.flash_attention.eight_bit import EightBit
from pallas_kernels.flash_attention.rows import RowSegment, clipped, split_rows, static

MAX_RANGES = 3


@dataclass(frozen=True)
class AttentionCall:
    """q [B, S, H, D]; k and v: one to three ranges [B, T_i, K, D] that stand one after another."""

    q: jax.Array
    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    rows: tuple[RowSegment, ...]
    scale: float
    eight: EightBit | None = None

    def __post_init__(self) -> None:
        q, k, v = self.q, self.k, self.v
        if q.ndim != 4:
            raise KernelInputError(f"q has shape {q.shape}; it must be [B, S, H, D]")
        if not 1 <= len(k) <= MAX_RANGES or len(k) != len(v):
            raise KernelInputError(f"{len(k)} key and {len(v)} value ranges; both need 1 to {MAX_RANGES}, equally many")
        batch, rows, heads, dim = q.shape
        for key, value in zip(k, v, strict=True):
            if key.ndim != 4 or key.shape != value.shape or key.shape[::3] != (batch, dim):
                raise KernelInputError(
                    f"key range {key.shape} and value range {value.shape} must both be [{batch}, T, K, {dim}]"
                )
            if key.shape[2] != self.kv_heads or heads % key.shape[2]:
                raise KernelInputError(f"{key.shape[2]} KV heads do not divide {heads} query heads, or ranges differ")
            if key.dtype != q.dtype or value.dtype != q.dtype:
                raise KernelInputError(f"q, k, v have dtypes {q.dtype}, {key.dtype}, {value.dtype}; they must agree")
        if not jnp.issubdtype(q.dtype, jnp.floating):
            raise KernelInputError(f"q has dtype {q.dtype}; it must be a floating type")
        if (total := sum(segment.rows for segment in self.rows)) != rows:
            raise KernelInputError(f"the row segments hold {total} rows, q has {rows}")
        for segment in self.rows:
            if (end := static(segment.end)) is not None and end > self.keys:
                raise KernelInputError(f"a row segment ends at key {end}; there are {self.keys}")

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k[0].shape[2]

    @property
    def keys(self) -> int:
        """T: the length of the concatenated ranges."""
        return sum(key.shape[1] for key in self.k)


def make_call(
    q: jax.Array,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rows: Sequence[RowSegment],
    scale: float | None,
    eight: EightBit | None = None,
) -> AttentionCall:
    """Validate, clip the bounds, drop empty ranges and segments, and let all arrays vary over the same mesh axes."""
    if not isinstance(k, (tuple, list)) or not isinstance(v, (tuple, list)):
        raise KernelInputError("k and v must be tuples of ranges, for one range k=(k,), v=(v,)")
    call = AttentionCall(
        q=q,
        k=tuple(k),
        v=tuple(v),
        rows=tuple(rows),
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        eight=eight,
    )
    kept = [i for i, key in enumerate(call.k) if key.shape[1]] or [0]
    segments = tuple(clipped(segment, call.keys) for segment in call.rows if segment.rows)
    dynamic, rebuild = split_rows(segments)
    q, ks, vs, dynamic = vary_together((q, [call.k[i] for i in kept], [call.v[i] for i in kept], dynamic))
    return replace(call, q=q, k=tuple(ks), v=tuple(vs), rows=rebuild(dynamic))

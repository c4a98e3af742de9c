"""One validated call of decode_attention."""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError
from pallas_kernels.flash_attention.rows import clip

EIGHT_BITS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """Keys or values in 8 bits: codes [..., T, K, D] (float8_e4m3fn or int8) and the float32 scale of each row."""

    values: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class DecodeCall:
    """q [B, M, H, D], k and v [B, T, K, D], lengths int32 [B], causal_offset None or int32 [B], any integers.

    With ``layer`` (int32 scalar) k and v are stacks of all layers, [L, B, T, K, D]. Keys and values of 8 bits come with
    ``k_scale`` and ``v_scale``, float32, of their shape without D: a value is its code times its row's scale.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    causal_offset: jax.Array | None
    scale: float
    layer: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    def __post_init__(self) -> None:
        q, k = self.q, self.k
        if q.ndim != 4:
            raise KernelInputError(f"q has shape {q.shape}; it must be [B, M, H, D]")
        axes = 4 if self.layer is None else 5
        if k.ndim != axes or k.shape != self.v.shape or k.shape[axes - 4 :][::3] != q.shape[::3]:
            wanted = "[B, T, K, D]" if self.layer is None else "[L, B, T, K, D]"
            raise KernelInputError(f"k {k.shape} and v {self.v.shape} must both be {wanted} with q {q.shape}")
        if q.shape[2] % self.kv_heads:
            raise KernelInputError(f"{self.kv_heads} KV heads do not divide {q.shape[2]} query heads")
        if k.dtype != self.v.dtype or (not self.quantised and q.dtype != k.dtype):
            raise KernelInputError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {self.v.dtype}; they must agree")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if (scale is not None) != self.quantised:
                raise KernelInputError(f"k has {k.dtype} and {name} is {'missing' if scale is None else 'given'}")
            if scale is not None and (scale.shape != k.shape[:-1] or scale.dtype != jnp.float32):
                raise KernelInputError(
                    f"{name} is {scale.dtype}{list(scale.shape)}; it must be float32{list(k.shape[:-1])}"
                )

    @property
    def quantised(self) -> bool:
        """Whether keys and values have 8 bits."""
        return self.k.dtype in EIGHT_BITS

    @property
    def keys(self) -> int:
        """Slots of the cache, T."""
        return self.k.shape[-3]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.k.shape[-2]

    def one_layer(self) -> "DecodeCall":
        """The same call on the keys and values of its layer alone, [B, T, K, D]: a copy, unless XLA fuses it."""
        if self.layer is None:
            return self
        stacks = {name: getattr(self, name) for name in ("k", "v", "k_scale", "v_scale")}
        alone = {
            name: jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False)
            for name, a in stacks.items()
            if a is not None
        }
        return dataclasses.replace(self, layer=None, **alone)

    def dequantised(self) -> "DecodeCall":
        """The same call on the values that 8-bit codes stand for, all in float32."""
        if self.k_scale is None or self.v_scale is None:
            return self
        k, v = ((a.astype(jnp.float32) * s[..., None]) for a, s in ((self.k, self.k_scale), (self.v, self.v_scale)))
        return dataclasses.replace(self, q=self.q.astype(jnp.float32), k=k, v=v, k_scale=None, v_scale=None)

    @property
    def limits(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Lengths and offsets below and above which nothing changes."""
        return (0, self.keys), (-self.q.shape[1], self.keys)

    def clipped(self) -> "DecodeCall":
        """The same call with lengths and offsets within their limits: kernels do it themselves, without a launch."""
        lengths, offsets = self.limits
        offset = None if self.causal_offset is None else jnp.clip(self.causal_offset, *offsets)
        return dataclasses.replace(self, lengths=jnp.clip(self.lengths, *lengths), causal_offset=offset)

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """First key and end of each row's interval, int32 [B, M]."""
        batch, rows = self.q.shape[:2]
        stop = jnp.broadcast_to(self.lengths[:, None], (batch, rows))
        if self.causal_offset is not None:
            stop = jnp.minimum(stop, self.causal_offset[:, None] + jnp.arange(1, rows + 1, dtype=jnp.int32))
        return jnp.zeros_like(stop), stop


def _per_batch(value: jax.Array | int, limits: tuple[int, int], batch: int, name: str) -> jax.Array:
    whole = value if isinstance(value, jax.Array) and value.dtype == jnp.int32 else clip(value, *limits)
    array = jnp.asarray(whole, jnp.int32)
    if array.shape not in ((), (batch,)):
        raise KernelInputError(f"{name} has shape {array.shape}; it must be ({batch},)")
    return jnp.broadcast_to(array, (batch,))


def make_call(q, k, v, lengths, causal_offset, scale, layer=None) -> DecodeCall:
    """Validate, bring lengths and offsets to 32 bits, and let all arrays vary over the same mesh axes."""
    (k, k_scale), (v, v_scale) = ((a.values, a.scale) if isinstance(a, Codes) else (a, None) for a in (k, v))
    slots = k.shape[-3]
    lengths = _per_batch(lengths, (0, slots), q.shape[0], "lengths")
    if causal_offset is not None:  # callers pass a huge one where it hides nothing; the kernel multiplies it
        causal_offset = _per_batch(causal_offset, (-q.shape[1], slots), q.shape[0], "causal_offset")
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    arrays = (q, k, v, lengths, causal_offset, layer, k_scale, v_scale)
    q, k, v, lengths, causal_offset, layer, k_scale, v_scale = vary_together(arrays)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return DecodeCall(q, k, v, lengths, causal_offset, scale, layer, k_scale, v_scale)

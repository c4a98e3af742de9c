"""Attention over parts of the keys, and their exact merge: rows of all query heads of a KV head packed together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


def packed(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, M, H, ...] as [B, K, M * G, ...]: row m * G + g is row m of query head g of the group."""
    batch, rows, heads, *rest = q.shape
    group = heads // kv_heads
    return q.reshape(batch, rows, kv_heads, group, *rest).swapaxes(1, 2).reshape(batch, kv_heads, rows * group, *rest)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """Attention of packed rows over each of P sets of keys, float32; a row that sees none of a set: 0 and -inf."""

    out: jax.Array
    """[B, K, P, M * G, D]"""
    lse: jax.Array
    """[B, K, P, M * G], natural."""
    rows: int = field(metadata={"static": True})
    """M"""

    @classmethod
    def whole(cls, out: jax.Array, lse: jax.Array, kv_heads: int) -> "Parts":
        """One part, of out [B, M, H, D] and lse [B, H, M]."""
        flat = packed(lse.swapaxes(1, 2), kv_heads)
        return cls(packed(out, kv_heads)[:, :, None], flat[:, :, None], out.shape[1])

    @classmethod
    def beside(cls, several: Sequence["Parts"]) -> "Parts":
        """The parts of all of them, of the same rows."""
        out, lse = (jnp.concatenate([getattr(one, name) for one in several], axis=2) for name in ("out", "lse"))
        return cls(out, lse, several[0].rows)

    def of_batch(self, count: int) -> "Parts":
        """``count`` neighbouring batch entries, which are the same rows over other keys, as parts of one."""

        def moved(array: jax.Array) -> jax.Array:  # [B * V, K, P, ...] -> [B, K, V * P, ...]
            batch, kv_heads, parts, *rest = array.shape
            apart = array.reshape(batch // count, count, kv_heads, parts, *rest).swapaxes(1, 2)
            return apart.reshape(batch // count, kv_heads, count * parts, *rest)

        return Parts(moved(self.out), moved(self.lse), self.rows)

    def merged(self) -> tuple[jax.Array, jax.Array]:
        """out [B, M, H, D] and lse_nat [B, H, M] of all parts' keys; a row that sees nothing anywhere: 0 and -inf."""
        batch, kv_heads, parts, packed_rows = self.lse.shape
        group = packed_rows // self.rows

        def unpacked(array: jax.Array) -> jax.Array:  # [B, K, M * G, ...] -> [B, M, H, ...]
            array = array.reshape(batch, kv_heads, self.rows, group, *array.shape[3:])
            return array.swapaxes(1, 2).reshape(batch, self.rows, kv_heads * group, *array.shape[4:])

        if parts == 1:
            return unpacked(self.out[:, :, 0]), unpacked(self.lse[:, :, 0]).swapaxes(1, 2)
        peak = self.lse.max(axis=2, keepdims=True)
        weights = jnp.exp(self.lse - jnp.where(jnp.isneginf(peak), 0.0, peak))
        total = weights.sum(axis=2)
        seen = total != 0  # true for NaN, which must not pass for a row that saw nothing
        safe = jnp.where(seen, total, 1.0)
        whole = (self.out * weights[..., None]).sum(axis=2) / safe[..., None]
        whole_lse = jnp.where(seen, peak[:, :, 0] + jnp.log(safe), -jnp.inf)
        return unpacked(whole), unpacked(whole_lse).swapaxes(1, 2)

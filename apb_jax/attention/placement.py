"""Shards are parts of the document, devices are places: which device holds which shards, and collectives over all.

A device holds ``local`` shards; they are an axis mapped by ``vmap`` inside ``shard_map``'s sequence axis. With one
shard a device nothing is mapped, and a collective is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from apb_jax.errors import UserError
from apb_jax.mesh import SP
from apb_jax.typed import check_types

LOCAL = "local_shards"
ORDERS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Placement:
    """``local`` shards on each of ``devices``.

    ``order``: "contiguous" (neighbours), or "zigzag" (pairs i and N-1-i, so that methods whose later shards see more
    give every device the same work).
    """

    devices: int
    local: int = 1
    order: str = "contiguous"

    def __post_init__(self) -> None:
        check_types(self)
        if self.order not in ORDERS:
            raise UserError(f"placement {self.order!r} is unknown; choose one of {', '.join(ORDERS)}")
        if self.devices < 1 or self.local < 1:
            raise UserError(f"{self.local} shards on each of {self.devices} devices; both must be at least 1")
        if self.order == "zigzag" and self.local % 2 and self.devices > 1:
            raise UserError(
                f"zigzag places pairs of shards, and a device has {self.local}; "
                f"nearest legal choice: --shards {self.devices * (self.local + 1)}, or --placement contiguous"
            )

    @classmethod
    def of(cls, shards: int, devices: int, order: str = "contiguous") -> Placement:
        """``shards`` over ``devices``; UserError where they do not divide."""
        if shards < 1 or shards % devices:
            nearest = max(1, round(shards / devices)) * devices
            raise UserError(
                f"--shards {shards} is no multiple of the {devices} devices on the sequence axis; "
                f"nearest legal choice: --shards {nearest}"
            )
        return cls(devices, shards // devices, order)

    @classmethod
    def for_method(cls, exact: bool, shards: int | None, devices: int, order: str) -> Placement:
        """As asked for (None: one shard a device), but a shard a device where more or another order change nothing."""
        asked = cls.of(devices if shards is None else shards, devices)
        if exact or asked.local == 1:
            return cls(devices)
        return cls(devices, asked.local, order)

    @property
    def shards(self) -> int:
        """Shards of the document."""
        return self.devices * self.local

    @property
    def table(self) -> np.ndarray:
        """int32 [devices, local]: the shards of each device."""
        count = self.shards
        if self.order == "contiguous" or self.devices == 1:
            return np.arange(count, dtype=np.int32).reshape(self.devices, self.local)
        low = np.arange(count // 2, dtype=np.int32).reshape(self.devices, self.local // 2)
        return np.stack([low, count - 1 - low], axis=2).reshape(self.devices, self.local)

    @property
    def order_of_rows(self) -> np.ndarray:
        """int32 [N]: the shard at each place of the sequence axis, device after device."""
        return self.table.reshape(-1)

    @property
    def places(self) -> np.ndarray:
        """int32 [N]: where each shard stands on the sequence axis; the inverse of ``order_of_rows``."""
        return np.argsort(self.order_of_rows).astype(np.int32)

    # ---- inside programs -------------------------------------------------------------------------------------------

    def on_device(self) -> Int[Array, " V"]:
        """The shards of this device; inside ``shard_map``."""
        return jnp.take(jnp.asarray(self.table), jax.lax.axis_index(SP), axis=0)

    def index(self) -> Int[Array, ""]:
        """This shard; inside ``each_shard``."""
        if self.local == 1:
            return jax.lax.axis_index(SP)
        return jnp.take(self.on_device(), jax.lax.axis_index(LOCAL))

    def all_gather(self, x: Array, *, axis: int, tiled: bool = False) -> Array:
        """Every shard's ``x`` in shard order, stacked on ``axis`` or joined (``tiled``); one ``all_gather``."""
        if self.local == 1:
            return jax.lax.all_gather(x, SP, axis=axis, tiled=tiled)
        parts = jax.lax.all_gather(x, LOCAL, axis=0)
        if self.devices > 1:
            parts = jax.lax.all_gather(parts, SP, axis=0, tiled=True)
        if self.order != "contiguous":
            parts = parts[self.places]
        stacked = jnp.moveaxis(parts, 0, axis)
        if not tiled:
            return stacked
        return stacked.reshape(*x.shape[:axis], self.shards * x.shape[axis], *x.shape[axis + 1 :])

    def psum(self, x: Array) -> Array:
        """The sum over all shards; one ``psum``."""
        return self._over(jax.lax.psum, x)

    def pmax(self, x: Array) -> Array:
        """The maximum over all shards; one ``pmax``."""
        return self._over(jax.lax.pmax, x)

    def _over(self, reduce: Callable[[Array, str], Array], x: Array) -> Array:
        x = reduce(x, LOCAL) if self.local > 1 else x
        return x if self.local > 1 and self.devices == 1 else reduce(x, SP)

    def each_shard(self, function: Callable[..., Any], *rows: Any) -> Any:
        """``function`` for every shard of this device; arrays of ``rows`` and of its result have rows in axis 1.

        Collectives inside it go through the placement. Arrays that all shards share belong into its closure.
        """
        if self.local == 1:
            return function(*rows)
        count = self.local
        split = lambda a: a.reshape(a.shape[0], count, a.shape[1] // count, *a.shape[2:])  # noqa: E731
        join = lambda a: a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])  # noqa: E731
        mapped = jax.vmap(function, in_axes=1, out_axes=1, axis_name=LOCAL, axis_size=count)
        return jax.tree.map(join, mapped(*jax.tree.map(split, rows)))

"""Which keys a query row sees: one interval a row, given by three numbers per segment of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import KernelInputError

Bound = int | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSegment:
    """``rows`` consecutive query rows under one rule.

    Row i of the segment (0-based) sees key j of the concatenated key ranges if and only if
    ``start <= j < min(end, offset + i + 1)``. Each bound is an int, an int32 scalar or an int32 [B];
    bounds that are arrays may depend on ``axis_index`` and are only known at run time.
    """

    rows: int = field(metadata={"static": True})
    start: Bound
    offset: Bound
    end: Bound

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or self.rows < 0:
            raise KernelInputError(f"RowSegment.rows is {self.rows!r}; it must be a static int >= 0")


def static(bound: Bound) -> int | None:
    """The bound as an int where it is known while tracing, else None."""
    if isinstance(bound, (int, np.integer)):
        return int(bound)
    return None


def clip(bound: Bound, low: int, high: int) -> Bound:
    """The bound between ``low`` and ``high``; an int stays an int, and may be wider than 32 bits."""
    if (known := static(bound)) is not None:
        return min(max(known, low), high)
    return jnp.clip(jnp.asarray(bound, jnp.int32), low, high)


def clipped(segment: RowSegment, keys: int) -> RowSegment:
    """The same rule in bounds with which 32-bit sums stay exact: beyond these limits nothing changes."""
    return RowSegment(
        segment.rows,
        start=clip(segment.start, 0, keys),
        offset=clip(segment.offset, -segment.rows, keys),
        end=clip(segment.end, 0, keys),
    )


def per_batch(bound: Bound, batch: int) -> jax.Array:
    """The bound as int32 [B]."""
    array = jnp.asarray(bound, jnp.int32)
    if array.shape not in ((), (batch,)):
        raise KernelInputError(f"a RowSegment bound has shape {array.shape}; it must be () or ({batch},)")
    return jnp.broadcast_to(array, (batch,))


def split_rows(rows: Sequence[RowSegment]) -> tuple[list[jax.Array], Callable[[Sequence], tuple[RowSegment, ...]]]:
    """The bounds known at run time only, and the function that puts such a list back into the segments."""
    dynamic = [jnp.asarray(b) for s in rows for b in (s.start, s.offset, s.end) if static(b) is None]

    def rebuild(bounds: Sequence) -> tuple[RowSegment, ...]:
        fresh = iter(bounds)
        return tuple(
            RowSegment(s.rows, *(next(fresh) if static(b) is None else b for b in (s.start, s.offset, s.end)))
            for s in rows
        )

    return dynamic, rebuild


def row_bounds(rows: Sequence[RowSegment], batch: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First key and end of each row's interval: two int32 [B, S]; a row that sees nothing has first >= end."""
    first, stop = [], []
    for segment in (clipped(segment, keys) for segment in rows):
        start, offset, end = (per_batch(b, batch)[:, None] for b in (segment.start, segment.offset, segment.end))
        index = jnp.arange(segment.rows, dtype=jnp.int32)[None]
        first.append(jnp.broadcast_to(start, (batch, segment.rows)))
        stop.append(jnp.minimum(end, offset + index + 1))
    return jnp.concatenate(first, axis=1), jnp.concatenate(stop, axis=1)

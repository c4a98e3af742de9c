"""Several shards of the sequence axis on one device: ``shard_map``'s meaning through ``vmap`` over a named axis.

The collectives become plain array operations, so a method can be measured on eight shards where there is one GPU.
Memory and arithmetic are those of all shards together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from apb_jax.mesh import SP


def _axis(spec: P) -> int | None:
    """The dimension that is split over the sequence axis."""
    return next((i for i, name in enumerate(spec) if name == SP), None)


def _axes(specs: Any) -> Any:
    """``in_axes`` or ``out_axes`` of a tree of specs."""
    if all(_axis(spec) is None for spec in jax.tree.leaves(specs)):
        return None
    return jax.tree.map(_axis, specs)


def _reshape(axes: Any, tree: Any, change: Callable[[tuple[int, ...], int], tuple[int, ...]]) -> Any:
    """Every array of ``tree`` whose prefix in ``axes`` is a dimension d, with the shape ``change(shape, d)``."""
    leaves, structure = jax.tree.flatten(tree)
    spread = jax.tree.leaves(
        jax.tree.map(lambda axis, part: [axis] * len(jax.tree.leaves(part)), axes, tree, is_leaf=lambda x: x is None),
        is_leaf=lambda x: x is None,
    )
    out = [x if d is None else x.reshape(change(x.shape, d)) for x, d in zip(leaves, spread, strict=True)]
    return jax.tree.unflatten(structure, out)


def on_one_device(
    body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, shards: int
) -> Callable[..., Any]:
    """``body`` as ``shard_map`` would run it on ``shards`` devices, on one; arrays keep their global shapes."""
    in_axes, out_axes = tuple(_axes(spec) for spec in in_specs), _out_axes(out_specs)
    mapped = jax.vmap(body, in_axes=in_axes, out_axes=out_axes, axis_name=SP, axis_size=shards)

    def run(*args: Any) -> Any:
        split = _reshape(in_axes, args, lambda shape, d: (*shape[:d], shards, shape[d] // shards, *shape[d + 1 :]))
        merged = lambda shape, d: (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])  # noqa: E731
        return _reshape(out_axes, mapped(*split), merged)

    return run


def _out_axes(specs: Any) -> Any:
    return (
        tuple(_axes(spec) for spec in specs) if isinstance(specs, tuple) and not isinstance(specs, P) else _axes(specs)
    )

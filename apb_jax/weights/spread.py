"""A sharding under which every byte of an array lives on one device only.

Weights that a mesh replicates (all of them, over "sp") would otherwise be read or copied from the host once per device;
spread first and gathered by the devices' own links afterwards, each byte crosses the host once.
"""

from __future__ import annotations

import math

from jax.sharding import NamedSharding, PartitionSpec, Sharding


def spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """``sharding`` with its idle mesh axes laid over one array axis; unchanged where nothing divides."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    taken = {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    idle = tuple(name for name in mesh.axis_names if name not in taken and mesh.shape[name] > 1)
    if not idle:
        return sharding
    # The split axis first (a piece then lies inside its final slice), then the longest.
    for axis in sorted(range(len(shape)), key=lambda a: (spec[a] is None, -shape[a])):
        entry = spec[axis]
        names = (*(() if entry is None else (entry,) if isinstance(entry, str) else entry), *idle)
        if shape[axis] % math.prod(mesh.shape[name] for name in names) == 0:
            spec[axis] = names
            return NamedSharding(mesh, PartitionSpec(*spec))
    return sharding

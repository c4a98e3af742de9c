"""Matrices to e4m3 and back on the devices, and what a model and a device must be like for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.model.weights import QUANTISED, weights_of
from pallas_kernels.device import Device
from pallas_kernels.float8 import dequantise, quantise

STEP = 16
"""What cuBLAS's 8-bit products need to divide inputs and outputs of a matrix, on every device."""
ADA = (8, 9)


def refusal(config: ModelConfig, device: Device, *, tp: int = 1, slices: int = 1) -> str | None:
    """Why matrices of this model cannot be multiplied in 8 bits on ``device``, split so; None where they can."""
    if device.platform == "gpu" and (device.compute_capability is None or device.compute_capability < ADA):
        has = ".".join(map(str, device.compute_capability or ())) or "none"
        return f"8-bit products need Ada or Hopper (compute capability 8.9 or newer); {device.name} has {has}"
    sizes = config.sizes()
    for weight in weights_of(config.facts):
        if weight.path not in QUANTISED:
            continue
        for letter in weight.letters:
            size, shares = sizes[letter], tp * slices if letter == weight.split else 1
            if size % (shares * STEP):
                part = f"{size} split over {shares} devices" if shares > 1 else str(size)
                return f"8-bit products need sizes that {STEP} divides; {weight.path} has {part}"
    return None


def quantise_matrix(path: str, array: jax.Array, shardings: Mapping[str, Sharding]) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of the values and the scale of a stack [L, in, out]."""
    paths = [row.path for row in QUANTISED[path]]
    targets = tuple(shardings[name] for name in paths)

    def run(a: Any) -> Any:
        values, scale = quantise(a.swapaxes(-1, -2))
        return values, scale[..., 0]

    yield from zip(paths, jax.jit(run, out_shardings=targets)(array), strict=True)


def dequantise_matrix(path: str, arrays: Mapping[str, jax.Array], dtype: Any, sharding: Sharding) -> jax.Array:
    """The stack [L, in, out] that the values and the scale stand for."""
    pair = [arrays[row.path] for row in QUANTISED[path]]

    def run(values: Any, scale: Any) -> Any:
        return dequantise(values, scale[..., None], dtype).swapaxes(-1, -2)

    return jax.jit(run, out_shardings=sharding)(*pair)


def wide_sharding(path: str, shardings: Mapping[str, Sharding]) -> Sharding:
    """That of a matrix [L, in, out]: its own, or that of its values turned."""
    if path in shardings:
        return shardings[path]
    values = shardings[QUANTISED[path][0].path]
    if not isinstance(values, NamedSharding):
        return values
    spec = [*values.spec, *[None] * (3 - len(values.spec))]
    return NamedSharding(values.mesh, PartitionSpec(spec[0], spec[2], spec[1]))


def check_scales(arrays: Mapping[str, jax.Array], name: str) -> None:
    """Refuse scales that are 0 or negative: every value of such an output would be lost or turned round.

    Raises:
        UserError: with the path of the first such parameter and how many of its scales are at fault.
    """
    for rows in QUANTISED.values():
        path = rows[1].path
        if path in arrays and (count := int(jnp.sum(~(arrays[path] > 0)))):
            raise UserError(f"{name}: {path} holds {count:,} scales that are not above 0 (of {arrays[path].size:,})")


def without(shardings: Mapping[str, Sharding], paths: Iterable[str]) -> dict[str, Sharding]:
    """``shardings`` in which these matrices stand wide instead of in 8 bits."""
    wide = {path: wide_sharding(path, shardings) for path in paths}
    gone = {row.path for path in wide for row in QUANTISED[path]}
    return {path: one for path, one in shardings.items() if path not in gone} | wide

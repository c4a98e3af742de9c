"""A fingerprint sees every element and every place, and not how arrays are split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import apb_jax
from apb_jax.weights.fingerprint import fingerprint


def test_a_fingerprint_is_of_content_and_place() -> None:
    values = np.random.default_rng(0).standard_normal((7, 16)).astype(np.float32)
    whole = fingerprint({"a": jnp.asarray(values)})
    mesh = apb_jax.make_mesh(sp=4, tp=2)
    for spec in (PartitionSpec(None, "tp"), PartitionSpec(None, ("sp", "tp")), PartitionSpec()):
        assert fingerprint({"a": jax.device_put(values, NamedSharding(mesh, spec))}) == whole
    flipped = values.copy()
    flipped.view(np.uint32)[3, 5] ^= 1
    swapped = values.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [flipped, swapped, values.reshape(16, 7), values.T, -values, values.astype(np.float16)]
    found = [fingerprint({"a": jnp.asarray(x)}) for x in others]
    assert len({whole, fingerprint({"b": jnp.asarray(values)}), *found}) == len(found) + 2


def test_every_dtype_of_a_model_has_one() -> None:
    kinds = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)
    found = {fingerprint({"a": jnp.ones((3, 5), kind)}) for kind in kinds}
    assert len(found) == len(kinds)

"""NaN and infinity in weights are found where they enter, whatever file they came from: one pass on the devices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from apb_jax.errors import UserError
from apb_jax.mesh import to_host


@jax.jit
def _counts(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for path, x in arrays.items()}


def check_finite(arrays: Mapping[str, jax.Array], name: str) -> None:
    """Refuse weights that hold NaN or infinity; reads every array once, which costs far less than loading it.

    Raises:
        UserError: with the path of the first such parameter ("layers.q") and how many values of it are not finite.
    """
    floating = {path: x for path, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    for path, found in _counts(floating).items():
        count = int(to_host(found))
        if count:
            raise UserError(
                f"{name}: the weight {path} holds {count:,} values that are NaN or infinite (of "
                f"{arrays[path].size:,}, as {arrays[path].dtype}); the file is damaged, or the dtype too narrow"
            )

"""The places where JAX 0.10 to 0.12 differ or where only a private name serves."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib import cuda_versions

JAX_VERSION = jax.__version_info__


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which any of the arrays varies (empty outside a checked shard_map)."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """Every array of ``tree`` marked as varying over all of ``axes``, so that loop carries agree in type."""

    def mark(array: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        missing = tuple(sorted(axes - varying_axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree)


def vary_together(tree: Any) -> Any:
    """Every array of ``tree`` marked as varying over the union of their axes."""
    return vary_over(varying_axes(*jax.tree.leaves(tree)), tree)


def array_type(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel output that varies over the same mesh axes as the arrays ``like``."""
    axes = varying_axes(*like)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(vary_together(like)[0]).manual_axis_type)


def transpose_smem(ref: Any) -> Any:
    """A two-dimensional shared-memory reference with its axes exchanged (a function of plgpu in JAX 0.10)."""
    if JAX_VERSION < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def load_smem(ref: Any, layout: Any) -> jax.Array:
    """The whole of a shared-memory reference in registers, in ``layout`` (JAX 0.10 wants an index)."""
    if JAX_VERSION < (0, 11):
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]


def cuda_runtime_version() -> int | None:
    """1000 x major + 10 x minor of the CUDA runtime beside JAX, for example 12090; None without one."""
    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()

"""Launching a kernel written in the Triton language from JAX, through jax-triton.

jax-triton can be imported only where JAX has a GPU, so nothing here imports it, or Triton, before a kernel runs.
"""

import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_over, vary_together, varying_axes
from pallas_kernels.device import Device, current


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel`` (a `triton.jit` function) over the programs (blocks[0], blocks[1], batch).

    The kernel takes pointers to the inputs, then to the outputs, then ``constants`` by name (compile-time
    values). Every input and output has the batch as its first axis and is contiguous. ``outputs``: shape
    without the batch, and dtype.
    """

    name: str
    kernel: Any
    blocks: tuple[int, int]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.blocks) < 1 or self.blocks[1] > 65535:
            raise ValueError(f"{self.name}: a GPU takes 1 to 65535 blocks on its second axis, not {self.blocks}")


def refuse(device: Device) -> str | None:
    """The reason why no Triton kernel can run on ``device``, or None if one can."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU, the default device is {device.name}"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs the package {missing[0].replace('_', '-')}, which is not installed (`pip install jax-triton`)"
    return None


def run(launch: Launch, batch: int, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The outputs of one launch through jax-triton."""
    import jax_triton

    outputs = tuple(jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in launch.outputs)
    parameters = inspect.signature(jax_triton.triton_call).parameters
    if "out_type" in parameters:
        named = {"out_type": outputs, "backend_options": {"enable_fp_fusion": True}}
    else:  # before jax-triton 0.4, the newest for Python 3.11; products and sums are fused by default there
        named = {"out_shape": outputs}
    major, minor = current().compute_capability or (0, 0)
    return jax_triton.triton_call(
        *arrays,
        kernel=launch.kernel,
        **named,
        grid=(*launch.blocks, batch),
        compute_capability=10 * major + minor,
        name=launch.name,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch.constants,
    )


def call(launch: Launch, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The outputs of ``launch``; under `jax.vmap` the mapped axis becomes part of the batch: one launch for all."""
    axes = varying_axes(*arrays)

    @jax.custom_batching.custom_vmap
    def launched(*arrays):
        return run(launch, arrays[0].shape[0], arrays)

    @launched.def_vmap
    def _(size, mapped, *arrays):
        arrays = tuple(a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in zip(arrays, mapped, strict=True))
        outs = call(launch, *(a.reshape(-1, *a.shape[2:]) for a in arrays))
        return tuple(out.reshape(size, -1, *out.shape[1:]) for out in outs), (True,) * len(outs)

    return vary_over(axes, launched(*vary_together(arrays)))

"""The device that kernels are chosen for."""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from pallas_kernels.compat import cuda_runtime_version

_assumed: contextvars.ContextVar["Device | None"] = contextvars.ContextVar("assumed_device", default=None)


@dataclass(frozen=True)
class Device:
    """A device kind: ``platform`` "cpu" | "gpu" | ..., and on NVIDIA GPUs the compute capability."""

    platform: str
    name: str
    compute_capability: tuple[int, int] | None = None

    @property
    def slug(self) -> str:
        """The name as a file name: "NVIDIA H200" -> "nvidia_h200"."""
        return "_".join(self.name.lower().split())


HOPPER = Device("gpu", "NVIDIA H200", (9, 0))


def current() -> Device:
    """The assumed device if there is one, else JAX's default device."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    default = getattr(jax.config, "jax_default_device", None)
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    capability = str(getattr(device, "compute_capability", "")) if device.platform == "gpu" else ""
    major, _, minor = capability.partition(".")
    # AMD GPUs have names such as gfx942 here: no CUDA kernel may claim those.
    pair = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return Device(device.platform, device.device_kind, pair)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Choose kernels as if ``device`` were the default: for ahead-of-time lowering without it."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def refuse_before_ampere(device: Device) -> str | None:
    """The reason why attention on tensor cores in bfloat16 cannot run on ``device``, or None if it can."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU, the default device is {device.name}"
    if device.compute_capability < (8, 0):
        major, minor = device.compute_capability
        return f"needs compute capability 8.0 or newer, {device.name} has {major}.{minor}"
    return None


def refuse_before_ada(device: Device) -> str | None:
    """The reason why e4m3 values cannot be converted on ``device``, or None if they can."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU, the default device is {device.name}"
    if device.compute_capability < (8, 9):
        major, minor = device.compute_capability
        return f"needs compute capability 8.9 (Ada) or newer for e4m3, {device.name} has {major}.{minor}"
    return None


MISCOMPILING_CUDA = range(12080, 12091)  # CUDA 12.8.0 to 12.9.0; JAX's own attention_mgpu refuses the same


def refuse_unless_hopper(device: Device) -> str | None:
    """The reason why a Hopper kernel (wgmma, TMA) cannot run on ``device``, or None if it can."""
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA Hopper GPU, the default device is {device.name}"
    if device.compute_capability[0] != 9:
        major, minor = device.compute_capability
        return f"needs compute capability 9.0 (Hopper), {device.name} has {major}.{minor}"
    if (version := cuda_runtime_version()) is not None and version in MISCOMPILING_CUDA:
        found = f"{version // 1000}.{version % 1000 // 10}"
        return f"is refused under CUDA {found}: ptxas 12.8.0 to 12.9.0 miscompiles masks; `pip install jax[cuda13]`"
    return None

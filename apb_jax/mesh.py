"""The device mesh: axes ``sp`` (sequence) and ``tp`` (tensor), simulated devices on a CPU."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import Mesh

from apb_jax.errors import UserError
from apb_jax.host_memory import free_host_memory
from apb_jax.typed import check_value

SP, TP = "sp", "tp"
USABLE = 0.95
"""Share of a GPU's memory for JAX; the rest is for the CUDA context, NCCL and the code of programs."""
DEFAULT_SIMULATED = 8
MOST_SIMULATED = 64
"""Each simulated device has threads and a copy of the replicated weights in the one memory of the machine."""


def simulate_devices(count: int) -> None:
    """Ask for ``count`` simulated CPU devices; only works before JAX initialises its backends.

    Many simulated devices share few cores, so a collective may wait long for its last member: time-outs are widened.
    """
    if count > MOST_SIMULATED:
        raise UserError(
            f"{count} simulated devices (--sp times --tp) are more than a machine without GPU holds; nearest legal "
            f"choice: {MOST_SIMULATED} (more parts of the document: --shards)"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {
        "--xla_force_host_platform_device_count": str(count),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds": "300",
        "--xla_cpu_collective_call_terminate_timeout_seconds": "1200",
    }
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def sequence_devices(available: int, shards: int | None) -> int:
    """Devices on the sequence axis where none are asked for: all, or as many as hold equal numbers of ``shards``."""
    return available if shards is None else max(n for n in range(1, available + 1) if shards % n == 0)


def simulated_devices(model: str, sp: int | None, tp: int, shards: int | None = None) -> int:
    """Devices to simulate where there is no accelerator: as asked for, else what the model is best shown on.

    The packaged model shows eight shards on as many devices; any other answers faster on one (its shards stay).
    """
    return (sp or sequence_devices(DEFAULT_SIMULATED if model == "tiny" else 1, shards)) * tp


def check_host_memory(weights_bytes: int, copies: int) -> None:
    """Refuse more simulated devices than memory for their copies of the weights; nothing where the system is silent."""
    free = free_host_memory()
    if free is not None and weights_bytes * copies > free:
        fit = free // max(1, weights_bytes)
        holding = "the CPU device holds" if copies == 1 else f"{copies} simulated devices hold"
        raise UserError(
            f"{holding} {weights_bytes * copies / 2**30:.1f} GiB of weights, this machine has "
            f"{free / 2**30:.1f} GiB free; nearest legal choice: {f'--sp {fit}' if fit else 'a smaller --model'}"
        )


def has_accelerator() -> bool:
    """Whether JAX could use a GPU here, found without initialising JAX (initialising fixes the device count)."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return any(name in platforms for name in ("cuda", "gpu", "rocm"))
    from importlib.util import find_spec

    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    return os.path.exists("/dev/nvidiactl") and any(find_spec(name) for name in plugins)


def reserve_memory() -> None:
    """Let JAX take USABLE of every GPU where the user did not say how much; only before JAX initialises its backends.

    Its own default is three quarters, which refuses documents that the card holds.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(USABLE))


def reserve_host_memory() -> None:
    """Let XLA pin all free memory of the host, where its own limit is 64 GB; only before JAX initialises its backends.

    Pages are pinned as they are asked for.
    """
    free = free_host_memory()
    if free is not None:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(max(1, free // 2**30)))


def make_mesh(sp: int | None = None, tp: int = 1, *, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of ``sp`` x ``tp`` devices; ``sp`` defaults to all devices / ``tp``.

    Of several processes each gives the same number, so that none is left without a shard. Raises UserError where the
    machine has too few devices.
    """
    available = list(devices) if devices is not None else jax.devices()
    for name, value in (("sp", sp), ("tp", tp)):
        check_value(f"--{name}", value, int, *([type(None)] if name == "sp" else []))
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be a whole number of at least 1")
    if sp is None:
        sp = max(1, len(available) // tp)
    needed = sp * tp
    if needed > len(available):
        raise UserError(
            f"a mesh of sp={sp} x tp={tp} needs {needed} devices, here are {len(available)}; "
            f"nearest legal choice: --sp {max(1, len(available) // tp)} --tp {min(tp, len(available))}"
        )
    return Mesh(np.asarray(_evenly(available, needed)).reshape(sp, tp), (SP, TP))


def _evenly(available: list[jax.Device], needed: int) -> list[jax.Device]:
    """``needed`` devices, equally many of every process, in the order of ``available``."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in available:
        by_process.setdefault(device.process_index, []).append(device)
    count = len(by_process)
    if needed % count:
        raise UserError(
            f"a mesh of {needed} devices leaves {count} processes unequal shares; "
            f"nearest legal choice: {max(1, needed // count) * count} devices (--sp times --tp)"
        )
    share = needed // count
    if any(len(own) < share for own in by_process.values()):
        raise UserError(f"a mesh of {needed} devices needs {share} in each of {count} processes; one has fewer")
    return [device for own in by_process.values() for device in own[:share]]


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every host, also where other processes hold parts of it; all must call."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(x, tiled=True))

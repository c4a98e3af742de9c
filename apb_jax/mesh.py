"""The device mesh: axes ``sp`` (sequence) and ``tp`` (tensor), simulated devices on a CPU, several processes."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import Mesh

from apb_jax.errors import UserError

SP, TP = "sp", "tp"


def simulate_devices(count: int) -> None:
    """Ask for ``count`` simulated CPU devices; only works before JAX initialises its backends.

    Many simulated devices share few cores, so a collective may wait long for its last member: time-outs are widened.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {
        "--xla_force_host_platform_device_count": str(count),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds": "300",
        "--xla_cpu_collective_call_terminate_timeout_seconds": "1200",
    }
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def has_accelerator() -> bool:
    """Whether JAX could use a GPU here, found without initialising JAX (initialising fixes the device count)."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return any(name in platforms for name in ("cuda", "gpu", "rocm"))
    from importlib.util import find_spec

    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    return os.path.exists("/dev/nvidiactl") and any(find_spec(name) for name in plugins)


def make_mesh(sp: int | None = None, tp: int = 1, *, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of ``sp`` x ``tp`` devices; ``sp`` defaults to all devices / ``tp``.

    Raises UserError where the machine has too few devices.
    """
    available = list(devices) if devices is not None else jax.devices()
    for name, value in (("sp", sp), ("tp", tp)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if sp is None:
        sp = max(1, len(available) // tp)
    needed = sp * tp
    if needed > len(available):
        raise UserError(
            f"a mesh of sp={sp} x tp={tp} needs {needed} devices, here are {len(available)}; "
            f"nearest legal choice: --sp {max(1, len(available) // tp)} --tp {min(tp, len(available))}"
        )
    return Mesh(np.asarray(available[:needed]).reshape(sp, tp), (SP, TP))


def start_distributed(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join a run of several processes (``jax.distributed``); with nothing given, do nothing.

    On CPU the processes talk through gloo.
    """
    if coordinator is None and processes is None and process is None:
        return
    if coordinator is None or processes is None or process is None:
        raise UserError("--coordinator HOST:PORT, --processes N and --process I must be given together")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}; it must lie in 0..{processes - 1} (--processes {processes})")
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)

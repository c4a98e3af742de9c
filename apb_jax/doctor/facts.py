"""What the doctor looks at: versions, driver, devices, their links. Reading only; nothing needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "jax-triton",
    "nvidia-nccl-cu13",
    "nvidia-nccl-cu12",
)
VARIABLES = (
    "JAX_PLATFORMS",
    "LD_LIBRARY_PATH",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "NCCL_P2P_DISABLE",
)
TOOL_S = 20


@dataclass(frozen=True)
class Facts:
    """One machine as it was found; None and empty where it did not say."""

    packages: Mapping[str, str]
    """Installed ones of PACKAGES with their versions."""
    environment: Mapping[str, str]
    """Those of VARIABLES that are set."""
    platform: str
    """Of JAX's default device: "cpu", "gpu"."""
    device_kinds: tuple[str, ...]
    """A name per device."""
    nvidia_device: bool
    """Whether the machine has an NVIDIA driver's device file."""
    driver: str | None = None
    cuda_runtime: int | None = None
    """1000 x major + 10 x minor of the runtime beside JAX."""
    cudnn: int | None = None
    """10000 x major + 100 x minor + patch."""
    topology: str = ""
    """Output of ``nvidia-smi topo -m``."""
    memory: tuple[tuple[int, int], ...] = field(default=())
    """(bytes in use, bytes that JAX may take) of every device that says so."""


def probe() -> Facts:
    """The machine that this process runs on; starts JAX's backends."""
    import jax

    devices = jax.local_devices()
    cuda, cudnn = cuda_numbers()
    stats = [device.memory_stats() or {} for device in devices]
    return Facts(
        packages={name: found for name in PACKAGES if (found := installed(name))},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        platform=devices[0].platform,
        device_kinds=tuple(device.device_kind for device in devices),
        nvidia_device=os.path.exists("/dev/nvidiactl"),
        driver=driver_version(),
        cuda_runtime=cuda,
        cudnn=cudnn,
        topology=tool("nvidia-smi", "topo", "-m"),
        memory=tuple(
            (s["bytes_in_use"], s["bytes_limit"]) for s in stats if "bytes_limit" in s and "bytes_in_use" in s
        ),
    )


def installed(package: str) -> str | None:
    """The version of a package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_numbers() -> tuple[int | None, int | None]:
    """(CUDA runtime, cuDNN) beside JAX; None without them."""
    from pallas_kernels.compat import cuda_versions

    if cuda_versions is None:
        return None, None
    return cuda_versions.cuda_runtime_get_version(), cuda_versions.cudnn_get_version()


def driver_version() -> str | None:
    """Of the NVIDIA kernel module."""
    file = Path("/sys/module/nvidia/version")
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    lines = tool("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else None


def tool(*command: str) -> str:
    """Standard output of a tool; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""

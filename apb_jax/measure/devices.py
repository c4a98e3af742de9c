"""Figures that a kind of device reached: ``devices.json``, read by the plan's seconds and the doctor's self-test."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

from apb_jax.errors import UserError


@dataclass(frozen=True)
class DeviceFigures:
    """Measured ceilings of one kind of GPU; None where nobody measured it."""

    device_kind: str
    memory_mib: int
    matmul_tflops: float
    """A large bf16 product."""
    attention_tflops: float
    """Useful FLOPs of the prefill kernel."""
    all_gather_gb_per_s: float | None
    """Bytes that a device receives over time."""
    ppermute_gb_per_s: float | None
    source: str

    @property
    def memory_bytes(self) -> int:
        """Of the whole card."""
        return self.memory_mib * 2**20


def known_devices() -> dict[str, DeviceFigures]:
    """Every row by its short name."""
    stored = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {name: DeviceFigures(**row) for name, row in stored.items()}


def figures_named(name: str) -> DeviceFigures:
    """The row of a short name."""
    known = known_devices()
    if name not in known:
        raise UserError(f"device {name!r} has no measured figures; there are: {', '.join(known)}")
    return known[name]


def figures_of(device_kind: str) -> DeviceFigures | None:
    """The row of a device as JAX names it; None: nobody measured it."""
    return next((row for row in known_devices().values() if row.device_kind == device_kind), None)


def memory_limit(devices: Iterable[jax.Device]) -> int | None:
    """Bytes that JAX may take on the smallest device of this process; None where devices do not say (CPUs)."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in here]
    return min((limit for limit in limits if limit), default=None)

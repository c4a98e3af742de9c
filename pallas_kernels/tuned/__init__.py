"""Measured kernel parameters: one JSON file a device, written by `python -m benchmarks.tune`."""

import functools
import json
from pathlib import Path
from typing import Any

from pallas_kernels.device import Device

FOLDER = Path(__file__).parent


def path_for(device: Device) -> Path:
    """The file that belongs to a device."""
    return FOLDER / f"{device.slug}.json"


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def parameters(op: str, head_dim: int, device: Device) -> dict[str, int]:
    """The fields of the op's Config that were fastest on the device; empty where nothing was measured."""
    return dict(_read(path_for(device)).get("parameters", {}).get(op, {}).get(str(head_dim), {}))

"""What document KV in host memory costs: whether it fits there, and the seconds that every token reads it for."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apb_jax.attention.inputs import Prompt
from apb_jax.errors import UserError
from apb_jax.host_kv import PINNED
from apb_jax.host_memory import free_host_memory
from apb_jax.kv_memory import DEVICE, HOST
from apb_jax.measure.memory import Case, memory_of

if TYPE_CHECKING:
    from apb_jax.engine import Engine
    from apb_jax.session_store import Manifest

PROBE_BYTES = 64 * 2**20
QUEUED = 8
"""Copies on their way at once: one alone ends with a wait, which a stream of layers does not have."""
PROBES = 3


def bandwidth(mesh: Mesh) -> float:
    """Bytes a second from host memory to all devices together, the best of a few streams of copies; measured now."""
    sharding = NamedSharding(mesh, P(tuple(mesh.axis_names)), memory_kind=PINNED)
    data = jax.device_put(np.zeros((mesh.size, PROBE_BYTES // mesh.size), np.uint8), sharding)
    best = math.inf
    for _ in range(PROBES):
        started = time.perf_counter()
        copies = [jax.device_put(data, sharding.with_memory_kind(DEVICE), may_alias=False) for _ in range(QUEUED)]
        jax.block_until_ready(copies)
        best = min(best, time.perf_counter() - started)
        del copies
    return QUEUED * data.nbytes / best


def host_note(engine: Engine, prompts: Sequence[Prompt]) -> str | None:
    """What a user should know before a prefill into host memory; None where the KV stays on the devices.

    Raises:
        UserError: the host has less memory than the KV takes.
    """
    if engine.settings.kv_memory != HOST:
        return None
    case = Case.of(engine)
    needed = memory_of(case, *case.chosen(prompts)).host_bytes
    stay, layers = case.kv_layers, case.config.num_layers
    if not needed:
        return f"--kv {HOST}: all {layers} layers of the document's KV fit on the devices and stay there"
    return _cost(engine, needed, f" of {layers - stay} layers ({stay} fit on the devices)" if stay else "")


def saved_note(engine: Engine, manifest: Manifest) -> str | None:
    """The same before a session is loaded, which leaves no layer on the devices."""
    return _cost(engine, manifest.bytes, "") if engine.settings.kv_memory == HOST else None


def _cost(engine: Engine, needed: int, layers: str) -> str:
    free = free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"--kv {HOST}: the documents' KV takes {needed / 2**30:.1f} GiB of host memory, {free / 2**30:.1f} GiB are "
            "free; nearest legal choice: --kv-dtype int8 (half the bytes), or a shorter document (--seq)"
        )
    rate = bandwidth(engine.mesh)
    return (
        f"document KV in host memory: {needed / 2**30:.2f} GiB{layers}, read for the question and again for every "
        f"token of the answer, about {needed / rate:.2g} s each at {rate / 1e9:.0f} GB/s, as measured just now"
    )

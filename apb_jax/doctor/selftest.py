"""A few seconds of work: a product, the attention kernel against float32, collectives, the host's link, the disk."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apb_jax.doctor.findings import Finding
from apb_jax.measure.devices import DeviceFigures
from apb_jax.measure.host_link import bandwidth

ENOUGH = 0.8
"""Share of the expected figure below which a line is a note."""
TOLERANCE = 2e-2
"""Largest difference of attention in the device's type from float32; bf16 gives about 4e-3."""
REPEATS = 5


@dataclass(frozen=True)
class Sizes:
    """How much work: enough to fill a GPU, or small where a CPU only has to be right."""

    matmul: tuple[int, int, int]
    attention_rows: int
    exchange_rows: int
    """Rows of K and V (8 heads of 128) that each device sends."""
    disk_bytes: int = 256 * 2**20


GPU = Sizes((20480, 4096, 28672), 2048, 16384)
CPU = Sizes((256, 256, 256), 128, 64, 16 * 2**20)


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of one call, the best of a few after one that compiles; launches overlap nothing."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def against(subject: str, value: float, unit: str, expected: float | None, advice: str) -> Finding:
    """A figure beside what the device should reach."""
    said = f"{value:,.0f} {unit}"
    if expected is None:
        return Finding("ok", subject, f"{said} (nobody measured what to expect)")
    share = f"{said}, {value / expected:.0%} of the {expected:,.0f} expected"
    return Finding("ok", subject, share) if value >= ENOUGH * expected else Finding("note", subject, share, advice)


def matmul(sizes: Sizes, expected: DeviceFigures | None) -> Finding:
    """TFLOP/s of a large product in bf16; the result of a corner is checked."""
    m, k, n = sizes.matmul
    left, right = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((m, k), (k, n)))
    )
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.bfloat16))
    corner = np.asarray(product(left, right)[:8, :8], np.float32)
    right_corner = np.asarray(left[:8], np.float32) @ np.asarray(right[:, :8], np.float32)
    if not np.allclose(corner, right_corner, rtol=2e-2, atol=2e-2 * k**0.5):
        worst = float(np.abs(corner - right_corner).max())
        return Finding("broken", "matmul", f"wrong by {worst:.3g}", "reinstall JAX, or suspect the device")
    rate = 2e-12 * m * k * n / seconds_of(lambda: product(left, right))
    if jax.default_backend() == "cpu":
        return Finding("ok", "matmul", f"right ({rate * 1e3:,.0f} GFLOP/s on the CPU)")
    advice = "is the GPU shared, hot, or limited in power? nvidia-smi -q -d PERFORMANCE tells"
    return against("matmul", rate, "TFLOP/s", expected.matmul_tflops if expected else None, advice)


def attention(sizes: Sizes) -> Finding:
    """The prefill kernel that would be chosen here against a float32 reference."""
    from pallas_kernels.flash_attention import RowSegment, flash_attention

    rows, heads, kv, dim = sizes.attention_rows, 8, 2, 128
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    q, k, v = (jax.random.normal(jax.random.key(i), (1, rows, n, dim), dtype) for i, n in enumerate((heads, kv, kv)))
    causal = (RowSegment(rows, start=0, offset=0, end=rows),)
    got, _ = jax.jit(lambda q, k, v: flash_attention(q, (k,), (v,), causal))(q, k, v)
    wide = [np.asarray(a, np.float32)[0] for a in (q, k, v)]
    keys, values = (np.repeat(a, heads // kv, axis=1) for a in wide[1:])
    scores = np.einsum("qhd,khd->hqk", wide[0], keys) * dim**-0.5
    scores = np.where(np.tril(np.ones((rows, rows), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    right = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), values)
    worst = float(np.abs(np.asarray(got, np.float32)[0] - right).max())
    if not worst < TOLERANCE:  # also where it is not a number
        return Finding(
            "broken", "attention kernel", f"differs from float32 by {worst:.2g}", "run with --kernels reference"
        )
    return Finding("ok", "attention kernel", f"within {worst:.1g} of float32")


def collectives(sizes: Sizes, expected: DeviceFigures | None) -> list[Finding]:
    """GB/s that a device receives by all_gather and ppermute over all devices; the values are checked."""
    devices = jax.local_devices()
    count = len(devices)
    if count == 1:
        return [Finding("unchecked", "collectives", "there is one device")]
    mesh = Mesh(np.asarray(devices), ("x",))
    rows, width = sizes.exchange_rows, 2 * 8 * 128
    sharding = NamedSharding(mesh, P("x"))
    data = jax.device_put(
        jnp.broadcast_to(jnp.arange(count, dtype=jnp.bfloat16)[:, None, None], (count, rows, width)), sharding
    )
    route = [(i, (i + 1) % count) for i in range(count)]
    bodies = {
        "all_gather": (lambda x: jax.lax.all_gather(x, "x", axis=0, tiled=True)[None], count - 1),
        "ppermute": (lambda x: jax.lax.ppermute(x, "x", route), 1),
    }
    figures = {
        "all_gather": expected.all_gather_gb_per_s if expected else None,
        "ppermute": expected.ppermute_gb_per_s if expected else None,
    }
    found = []
    for name, (body, parts) in bodies.items():
        mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False))
        last = np.asarray(mapped(data)[-1], np.float32)
        right = np.arange(count) if name == "all_gather" else count - 2
        if not np.array_equal(np.unique(last), np.atleast_1d(right)):
            found.append(Finding("broken", name, "wrong values arrive", "NCCL_DEBUG=INFO shows the transport in use"))
            continue
        rate = 1e-9 * parts * rows * width * 2 / seconds_of(functools.partial(mapped, data))
        if devices[0].platform == "cpu":
            found.append(Finding("ok", name, f"right over {count} simulated devices"))
            continue
        advice = "NCCL_DEBUG=INFO shows whether it goes over NVLink"
        found.append(against(name, rate, "GB/s received", figures[name], advice))
    return found


def host_link() -> list[Finding]:
    """GB/s from pinned host memory to all devices; a CPU has none."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return []
    rate = bandwidth(Mesh(np.asarray(devices), ("x",)))
    said = f"{rate / 1e9:,.0f} GB/s: under --kv host a token over 16 GiB of KV takes at least {2**34 / rate:.2f} s"
    return [Finding("ok", "host memory to devices", said)]


def model_cache() -> Path:
    """The folder of downloaded models, or what exists of its path."""
    import huggingface_hub.constants

    folder = Path(huggingface_hub.constants.HF_HUB_CACHE)
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk(folder: Path, size: int) -> Finding:
    """MB/s read from the model cache's disk: a file of our own, dropped from the page cache before it is read."""
    block = os.urandom(2**20)
    name = str(folder).replace(str(Path.home()), "~", 1)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(len(block)):
                pass
            rate = size / 2**20 / (time.perf_counter() - started)
    except OSError as error:
        return Finding(
            "note", "disk", f"{name} cannot be written: {error.strerror}", "set HF_HOME to a folder of yours"
        )
    return Finding("ok", "disk", f"{rate:,.0f} MiB/s from {name}: 16 GB of weights take {16e9 / 2**20 / rate:,.0f} s")


def self_test(expected: DeviceFigures | None) -> list[Finding]:
    """All of it, a few seconds."""
    sizes = CPU if jax.default_backend() == "cpu" else GPU
    return [
        matmul(sizes, expected),
        attention(sizes),
        *collectives(sizes, expected),
        *host_link(),
        disk(model_cache(), sizes.disk_bytes),
    ]

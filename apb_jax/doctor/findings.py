"""From facts to findings: one line each, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from apb_jax.doctor.facts import Facts
from apb_jax.install import install_hint
from pallas_kernels.device import MISCOMPILING_CUDA

Level = Literal["ok", "note", "broken", "unchecked"]

JAX_FROM, JAX_BELOW = (0, 10, 2), (0, 13, 0)
DRIVERS = {12: 525, 13: 580}
"""CUDA major version -> least driver (NVIDIA's table of minor version compatibility)."""
NVLINK = re.compile(r"NV\d+")


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    level: Level
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<10}{self.subject}: {self.text}" + (f"; {self.advice}" if self.advice else "")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def examine(facts: Facts) -> list[Finding]:
    """Everything that facts alone say."""
    return [
        *jax_versions(facts),
        *backend(facts),
        *cuda(facts),
        *triton(facts),
        *links(facts),
        *memory(facts),
    ]


def jax_versions(facts: Facts) -> Iterator[Finding]:
    """JAX within the supported range; jaxlib and the CUDA plugin of the same release."""
    jax = facts.packages.get("jax", "")
    if not JAX_FROM <= numbers(jax) < JAX_BELOW:
        yield Finding("broken", "JAX", f"version {jax or 'unknown'}", "pip install 'jax>=0.10.2,<0.13'")
    else:
        yield Finding("ok", "JAX", f"{jax}, jaxlib {facts.packages.get('jaxlib', 'unknown')}")
    for name in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        plugin = facts.packages.get(name)
        if plugin is not None and numbers(plugin)[:3] != numbers(facts.packages.get("jaxlib", ""))[:3]:
            advice = f"pip install -U 'jax[{name[4:10]}]'"
            yield Finding("broken", name, f"{plugin} does not belong to this jaxlib: JAX goes without a GPU", advice)


def backend(facts: Facts) -> Iterator[Finding]:
    """Whether JAX uses what the machine has."""
    if facts.platform == "gpu":
        yield Finding("ok", "devices", f"{len(facts.device_kinds)} x {facts.device_kinds[0]}")
        if len(set(facts.device_kinds)) > 1:
            kinds = ", ".join(sorted(set(facts.device_kinds)))
            yield Finding("note", "devices", f"they differ: {kinds}", "the slowest one sets the pace of every layer")
    elif facts.nvidia_device:
        forced = facts.environment.get("JAX_PLATFORMS")
        advice = f"unset JAX_PLATFORMS (it is {forced})" if forced else "pip install 'jax[cuda13]' (or cuda12)"
        yield Finding("broken", "devices", "an NVIDIA driver is here and JAX runs on the CPU", advice)
    else:
        yield Finding("ok", "devices", f"no GPU; {len(facts.device_kinds)} CPU device(s)")
        yield Finding("unchecked", "driver, CUDA, cuDNN, NCCL, links, GPU memory, speed", "there is no GPU here")


def cuda(facts: Facts) -> Iterator[Finding]:
    """Driver, CUDA, cuDNN and NCCL, with the versions that are known to break."""
    if facts.platform != "gpu":
        return
    runtime = facts.cuda_runtime
    major = 0 if runtime is None else runtime // 1000
    said = "unknown" if runtime is None else f"{major}.{runtime % 1000 // 10}"
    least = DRIVERS.get(major)
    driver = facts.driver or "unknown"
    if least is not None and numbers(driver) and numbers(driver)[0] < least:
        yield Finding(
            "broken", "driver", f"{driver} is too old for CUDA {said}", f"install {least} or newer, or cuda12"
        )
    else:
        yield Finding("ok" if facts.driver else "note", "driver", driver)
    if runtime in MISCOMPILING_CUDA:
        text = f"{said}: ptxas 12.8.0 to 12.9.0 miscompiles causal masks, so the Mosaic kernels refuse to run"
        yield Finding("broken", "CUDA", text, "pip install -U 'jax[cuda13]'")
    else:
        yield Finding("ok" if runtime else "note", "CUDA", said)
    cudnn = facts.cudnn
    if cudnn is None:
        yield Finding("note", "cuDNN", "none found", "--kernels cudnn will refuse; the other kernels do not need it")
    else:
        yield Finding("ok", "cuDNN", f"{cudnn // 10000}.{cudnn % 10000 // 100}.{cudnn % 100}")
    nccl = next((found for name, found in facts.packages.items() if name.startswith("nvidia-nccl")), None)
    if nccl is None and len(facts.device_kinds) > 1:
        yield Finding(
            "note", "NCCL", "no package found", "pip install 'jax[cuda13]' brings it; a system's own may serve"
        )
    elif nccl is not None:
        yield Finding("ok", "NCCL", nccl)
    if "LD_LIBRARY_PATH" in facts.environment:
        text = f"LD_LIBRARY_PATH={facts.environment['LD_LIBRARY_PATH']} may put other CUDA libraries before JAX's own"
        yield Finding("note", "libraries", text, "unset it where JAX came with jax[cuda12] or jax[cuda13]")


def triton(facts: Facts) -> Iterator[Finding]:
    """The kernels in the Triton language need jax-triton."""
    if facts.platform != "gpu":
        return
    if "jax-triton" in facts.packages:
        yield Finding("ok", "jax-triton", facts.packages["jax-triton"])
    else:
        text = "not installed: selection and block-sparse attention use XLA, which is slower"
        yield Finding("note", "jax-triton", text, f"{install_hint('cuda13')} (or cuda12)")


def link_matrix(topology: str) -> dict[tuple[str, str], str]:
    """Links between pairs of GPUs out of ``nvidia-smi topo -m``: ("GPU0", "GPU1") -> "NV18"."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    lines = [line.split() for line in plain.splitlines() if line.strip()]
    header = next((line for line in lines if line[0].startswith("GPU") and line[:1] != line[1:2]), None)
    if header is None:
        return {}
    columns = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for line in lines[lines.index(header) + 1 :]:
        if line[0] in columns:
            for column, link in zip(columns, line[1:], strict=False):
                if column > line[0]:
                    found[line[0], column] = link
    return found


def links(facts: Facts) -> Iterator[Finding]:
    """How the GPUs reach each other."""
    if facts.platform != "gpu" or len(facts.device_kinds) < 2:
        return
    found = link_matrix(facts.topology)
    if not found:
        yield Finding("unchecked", "links", "nvidia-smi topo -m says nothing", "see all_gather below")
        return
    slow = {pair: link for pair, link in found.items() if not NVLINK.fullmatch(link)}
    if slow:
        pair, link = next(iter(slow.items()))
        text = f"{len(slow)} of {len(found)} pairs without NVLink ({pair[0]} to {pair[1]}: {link})"
        yield Finding("note", "links", text, "prefer methods that pass little (apb, star) to ring and ulysses")
    else:
        yield Finding(
            "ok", "links", f"NVLink between all {len(found)} pairs ({', '.join(sorted(set(found.values())))})"
        )
    if facts.environment.get("NCCL_P2P_DISABLE") not in (None, "0"):
        yield Finding("note", "links", "NCCL_P2P_DISABLE is set: every exchange goes through the host", "unset it")


def memory(facts: Facts) -> Iterator[Finding]:
    """What JAX may take of a GPU."""
    if not facts.memory:
        return
    used, limit = min(facts.memory, key=lambda pair: pair[1] - pair[0])
    said = ", ".join(f"{name}={facts.environment[name]}" for name in facts.environment if "CLIENT" in name)
    text = f"JAX may take {limit / 2**30:.1f} GiB of the smallest GPU, {used / 2**30:.1f} GiB are in use here"
    yield Finding("ok", "memory", text + (f" ({said})" if said else ""))
    if facts.environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() not in ("false", "0"):
        text = "JAX reserves this at its start, so a second process on the same GPU fails"
        yield Finding("note", "memory", text, "XLA_PYTHON_CLIENT_PREALLOCATE=false lets several share one")

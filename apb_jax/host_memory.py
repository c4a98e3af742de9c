"""How much memory of the host is free: the machine's, and what a container or a batch system lets this process take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, SYSTEM = Path("/proc"), Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of a control group, and the line of its memory.stat: its limit, what it uses, what of that can be freed."""


def free_host_memory(proc: Path = PROC, system: Path = SYSTEM) -> int | None:
    """Bytes that are free or can be freed; None where the system is silent.

    The least of the machine's and of every control group's that this process is in (docker, Kubernetes, SLURM).
    """
    found = [*_machine(proc), *_groups(proc, system)]
    return max(0, min(found)) if found else None


def _machine(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(proc: Path, system: Path) -> Iterator[int]:
    """Of each group with a limit, from this process's own up to the root; a container sees its own as the root."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, files = (system, V2) if not controllers else (system / "memory", V1)
        path = Path(name)
        for group in (path, *path.parents):
            yield from _group(root / str(group).lstrip("/"), *files)


def _group(folder: Path, limit: str, usage: str, freeable: str) -> Iterator[int]:
    most, used = ("".join(_lines(folder / name)) for name in (limit, usage))
    if most.isdigit() and used.isdigit():  # "max": no limit
        stat = dict(line.split() for line in _lines(folder / "memory.stat"))
        yield int(most) - int(used) + int(stat.get(freeable, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:  # not this system's, or not ours to read
        return []

"""Free memory of the host: the machine's, and what a control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apb_jax.host_memory import free_host_memory

GIB = 1 << 30


def machine(folder: Path, group: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc with 100 GiB free and a process in ``group``, and a /sys/fs/cgroup of these files."""
    proc, system = folder / "proc", folder / "cgroup"
    for path, text in {
        proc / "meminfo": f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n",
        proc / "self" / "cgroup": group,
        **{system / name: text for name, text in files.items()},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, system


def v2(limit: str) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{6 * GIB}\n",
        "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }


V1 = {
    "memory.limit_in_bytes": str(8 * GIB), "memory.usage_in_bytes": str(6 * GIB),
    "memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/\n", {}, 100),
        ("0::/job/step\n", {f"job/step/{k}": v for k, v in v2("max").items()}, 100),
        ("0::/job/step\n", {f"job/step/{k}": v for k, v in v2(str(8 * GIB)).items()}, 4),
        ("0::/job/step\n", {f"job/{k}": v for k, v in v2(str(8 * GIB)).items()}, 4),  # a limit of the parent
        ("0::/\n", v2(str(8 * GIB)), 4),  # a container's own group is its root
        ("0::/gone\n", v2(str(8 * GIB)), 4),
        ("0::/\n", v2(str(5 * GIB)), 1),
        ("0::/\n", v2(str(3 * GIB)), 0),
        ("5:cpu:/\n4:memory:/job\n0::/\n", {f"memory/job/{k}": v for k, v in V1.items()}, 3),
    ],
)
def test_the_least_of_machine_and_groups(tmp_path: Path, group: str, files: dict[str, str], free: int) -> None:
    assert free_host_memory(*machine(tmp_path, group, files)) == free * GIB


def test_a_silent_system_is_none(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path / "proc", tmp_path / "cgroup") is None


def test_this_machine_says_something() -> None:
    assert free_host_memory() > 2**20

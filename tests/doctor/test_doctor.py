"""The doctor: every known fault of a machine gets its line; the self-test is run for real on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from apb_jax.doctor import selftest
from apb_jax.doctor.__main__ import doctor, findings
from apb_jax.doctor.facts import Facts, cuda_numbers, installed, probe, tool
from apb_jax.doctor.findings import Finding, examine, link_matrix, numbers
from apb_jax.measure.devices import figures_named

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-47\t0
GPU1\tNV18\t X \tSYS\t0-47\t0
GPU2\tSYS\tSYS\t X \t48-95\t1

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
PACKAGES = {
    "jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2", "jax-triton": "0.3.1",
    "nvidia-nccl-cu13": "2.28.3",
}  # fmt: skip
HEALTHY = Facts(
    packages=PACKAGES,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    platform="gpu",
    device_kinds=("NVIDIA H100 80GB HBM3",) * 2,
    nvidia_device=True,
    driver="580.95.05",
    cuda_runtime=13000,
    cudnn=91400,
    topology=TOPOLOGY.replace("SYS", "NV18"),
    memory=((2**30, 75 * 2**30), (0, 75 * 2**30)),
)
ON_CPU = dataclasses.replace(HEALTHY, platform="cpu", device_kinds=("cpu",), nvidia_device=False, memory=())


def without(*names: str) -> dict[str, str]:
    """PACKAGES without these."""
    return {name: version for name, version in PACKAGES.items() if name not in names}


def test_a_healthy_machine_has_nothing_to_do() -> None:
    found = examine(HEALTHY)
    assert {finding.level for finding in found} == {"ok"}
    assert {"JAX", "devices", "driver", "CUDA", "cuDNN", "NCCL", "jax-triton", "links", "memory"} == {
        finding.subject for finding in found
    }
    assert all(not finding.advice and "\n" not in str(finding) for finding in found)


@pytest.mark.parametrize(
    ("changes", "level", "line"),
    [
        ({"packages": PACKAGES | {"jax": "0.10.1"}}, "broken", "JAX: version 0.10.1; pip install 'jax>=0.10.2,<0.13'"),
        ({"packages": PACKAGES | {"jax": "0.13.0"}}, "broken", "JAX: version 0.13.0"),
        ({"packages": PACKAGES | {"jax-cuda13-plugin": "0.10.2"}}, "broken", "pip install -U 'jax[cuda13]'"),
        ({"packages": without("jax-triton")}, "note", "jax-triton: not installed"),
        ({"packages": without("nvidia-nccl-cu13")}, "note", "NCCL: no package found"),
        ({"cuda_runtime": 12080}, "broken", "CUDA: 12.8: ptxas 12.8.0 to 12.9.0 miscompiles causal masks"),
        ({"cuda_runtime": 12090}, "broken", "CUDA: 12.9"),
        ({"driver": "570.124.06"}, "broken", "driver: 570.124.06 is too old for CUDA 13.0; install 580 or newer"),
        ({"driver": None}, "note", "driver: unknown"),
        ({"cudnn": None}, "note", "cuDNN: none found; --kernels cudnn will refuse"),
        ({"topology": TOPOLOGY}, "note", "links: 2 of 3 pairs without NVLink (GPU0 to GPU2: SYS)"),
        ({"topology": ""}, "unchecked", "links: nvidia-smi topo -m says nothing"),
        ({"device_kinds": ("NVIDIA H100 80GB HBM3", "NVIDIA H200")}, "note", "devices: they differ"),
        ({"environment": {}}, "note", "XLA_PYTHON_CLIENT_PREALLOCATE=false lets several share one"),
        ({"environment": {"LD_LIBRARY_PATH": "/opt/cuda"}}, "note", "libraries: LD_LIBRARY_PATH=/opt/cuda may put"),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}}, "note", "links: NCCL_P2P_DISABLE is set"),
        ({"platform": "cpu"}, "broken", "an NVIDIA driver is here and JAX runs on the CPU; pip install 'jax[cuda13]'"),
        ({"platform": "cpu", "environment": {"JAX_PLATFORMS": "cpu"}}, "broken", "unset JAX_PLATFORMS (it is cpu)"),
    ],
)
def test_every_fault_has_its_line(changes: dict, level: str, line: str) -> None:
    found = examine(dataclasses.replace(HEALTHY, **changes))
    assert [finding.level for finding in found if line in str(finding)] == [level]


def test_cuda_12_below_the_fault_is_fine() -> None:
    found = examine(dataclasses.replace(HEALTHY, cuda_runtime=12060, driver="535.104"))
    assert [str(f) for f in found if f.level == "broken"] == []


def test_a_cpu_says_what_it_cannot_check() -> None:
    (line,) = (finding for finding in examine(ON_CPU) if finding.level == "unchecked")
    assert "driver, CUDA, cuDNN, NCCL, links, GPU memory, speed: there is no GPU here" in str(line)


def test_links() -> None:
    assert link_matrix(TOPOLOGY) == {("GPU0", "GPU1"): "NV18", ("GPU0", "GPU2"): "SYS", ("GPU1", "GPU2"): "SYS"}
    assert link_matrix("no devices were found\n") == {}
    assert numbers("580.95.05") == (580, 95, 5)
    assert numbers("0.12.0.dev1") == (0, 12, 0)


def test_facts_of_this_machine() -> None:
    facts = probe()
    assert facts.packages["jax"] == jax.__version__
    assert facts.platform == jax.devices()[0].platform
    assert len(facts.device_kinds) == jax.local_device_count()
    assert installed("no-such-package-of-ours") is None
    assert tool("no-such-tool-of-ours") == ""
    assert tool("false") == ""
    assert len(cuda_numbers()) == 2


def test_self_test_passes_here() -> None:
    """Eight simulated devices: products, attention and both collectives are right; no speed is judged on a CPU."""
    found = {finding.subject: finding for finding in selftest.self_test(None)}
    assert set(found) == {"matmul", "attention kernel", "all_gather", "ppermute", "disk"}
    assert {finding.level for finding in found.values()} == {"ok"}


def test_the_host_link_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --kv host would cost is said of GPUs alone."""
    monkeypatch.setattr(selftest, "bandwidth", lambda mesh: 2.0**36)
    assert selftest.host_link() == []
    monkeypatch.setattr("jax.local_devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(selftest, "Mesh", lambda devices, axes: devices)
    (found,) = selftest.host_link()
    assert found.text == "69 GB/s: under --kv host a token over 16 GiB of KV takes at least 0.25 s"


def test_self_test_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import pallas_kernels.flash_attention as kernels

    right = kernels.flash_attention
    monkeypatch.setattr(kernels, "flash_attention", lambda *a: (right(*a)[0] + 0.1, None))
    assert selftest.attention(selftest.CPU).level == "broken"
    monkeypatch.setattr(kernels, "flash_attention", lambda *a: (right(*a)[0] * jnp.nan, None))
    assert "run with --kernels reference" in str(selftest.attention(selftest.CPU))
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, axis, route: x)
    levels = {finding.subject: finding.level for finding in selftest.collectives(selftest.CPU, None)}
    assert levels == {"all_gather": "ok", "ppermute": "broken"}
    product = jnp.matmul
    monkeypatch.setattr(jnp, "matmul", lambda *a, **k: product(*a, **k) + jnp.asarray(30, jnp.bfloat16))
    assert selftest.matmul(selftest.CPU, None).level == "broken"


def test_slow_is_a_note_and_unknown_is_said() -> None:
    assert selftest.against("matmul", 690, "TFLOP/s", 700, "look").level == "ok"
    slow = selftest.against("matmul", 350, "TFLOP/s", 700, "look")
    assert str(slow) == "note      matmul: 350 TFLOP/s, 50% of the 700 expected; look"
    assert "nobody measured what to expect" in str(selftest.against("ppermute", 70, "GB/s", None, "look"))


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    assert "set HF_HOME to a folder of yours" in str(selftest.disk(tmp_path / "absent", 1))


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    """1 where something is broken, 0 for notes; the self-test gets the figures of the device."""
    given = []

    def measured(expected: object) -> list[Finding]:
        given.append(expected)
        return [Finding("note", "matmul", "slow")]

    assert doctor(HEALTHY, measured) == 0
    assert capsys.readouterr().out.endswith("nothing is broken\n")
    assert given == [figures_named("h100")]
    assert doctor(dataclasses.replace(HEALTHY, cuda_runtime=12080), None) == 1
    assert "1 broken: do what these lines say" in capsys.readouterr().out
    other = dataclasses.replace(HEALTHY, device_kinds=("NVIDIA A100-SXM4-80GB",))
    assert any("no measured figures of NVIDIA A100-SXM4-80GB" in str(f) for f in findings(other, lambda _: []))

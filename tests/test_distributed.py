"""Two processes joined by ``jax.distributed`` give the answer of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hf_checkpoints import write_checkpoint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(600)
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", heads=True)
    command = [sys.executable, "-m", "apb_jax.run", "--model", str(folder), "--seq", "250", "--max-new-tokens", "20"]
    command += ["--sp", "4", "--anchor", "36", "--passing", "8", "--query-at", "2", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "APB_JAX_CACHE": "off"}
    environment.pop("XLA_FLAGS", None)  # each process makes its own share of the simulated devices

    def start(*extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    port = free_port()
    joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    pair = [start(*joined, "--process", str(i)) for i in range(2)]
    outputs = [process.communicate(timeout=500) for process in pair]
    alone = start().communicate(timeout=300)
    assert [process.returncode for process in pair] == [0, 0], outputs
    together, single = (json.loads(out.splitlines()[-1]) for out in (outputs[0][0], alone[0]))
    assert together["mesh"] == single["mesh"] == {"sp": 4, "tp": 1}
    assert together["method"] == "apb"
    assert len(single["tokens"]) == 20
    assert together["tokens"] == single["tokens"]
    assert "{" not in outputs[1][0], "only process 0 speaks"

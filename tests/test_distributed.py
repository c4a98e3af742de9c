"""Two processes joined by ``jax.distributed`` give the answer of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import pytest
from hf_checkpoints import write_checkpoint

from apb_jax.joining import Joining


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "APB_JAX_CACHE": "off"}
ENVIRONMENT.pop("XLA_FLAGS", None)  # each process makes its own share of the simulated devices


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run on a model made here, without its mesh."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), heads=True)
    return [sys.executable, "-m", "apb_jax.run", "--model", str(folder), "--seq", "250", "--json", "--anchor", "36",
            "--passing", "8", "--query-at", "2"]  # fmt: skip


def start(command: list[str], **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | extra)


def together(command: list[str], count: int = 2, **extra: str) -> list[subprocess.Popen[str]]:
    """The same command as ``count`` processes that join."""
    joined = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count)]
    return [start([*command, *joined, "--process", str(i)], **extra) for i in range(count)]


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object of a run that went well."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [["--sp", "4", "--max-new-tokens", "20", "--compare", "full,ring"]])
def test_two_processes_answer_and_compare_as_one(command: list[str], flags: list[str]) -> None:
    """The answer, the receipts and the recovered mass; only the first process speaks."""
    pair = together([*command, *flags])
    first = outcome(pair[0])
    assert "{" not in pair[1].communicate(timeout=60)[0]
    alone = outcome(start([*command, *flags]))
    assert first["mesh"] == alone["mesh"] == {"sp": 4, "tp": 1}
    assert first["method"] == "apb"
    assert len(alone["tokens"]) == 20
    assert first["tokens"] == alone["tokens"]
    for ours, theirs in zip([first, *first["compare"]], [alone, *alone["compare"]], strict=True):
        assert ours["recovered_mass"]["mean"] == pytest.approx(theirs["recovered_mass"]["mean"], abs=1e-5)
        if "receipt" in ours:
            assert ours["receipt"]["kl_mean"] == pytest.approx(theirs["receipt"]["kl_mean"], abs=1e-5)


@pytest.mark.timeout(300)
def test_a_mesh_smaller_than_the_devices_gives_every_process_a_share(command: list[str]) -> None:
    """Two processes of four devices each, a mesh of two: one device of each, not two of the first."""
    flags = [*command, "--sp", "2", "--max-new-tokens", "3"]
    device_flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    port = free_port()
    joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    pair = [start([*flags, *joined, "--process", str(i)], **device_flags) for i in range(2)]
    first = outcome(pair[0])
    pair[1].communicate(timeout=60)
    assert pair[1].returncode == 0
    assert first["tokens"] == outcome(start(flags))["tokens"]


TWO_QUESTIONS = """
import json, sys
from pathlib import Path
from apb_jax.joining import Joining
from apb_jax.mesh import simulate_devices
address, count, place, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
simulate_devices(2 // count)
Joining(*((address, count, place) if count > 1 else ())).start()
import apb_jax
engine = apb_jax.Engine(apb_jax.load(folder), "apb", apb_jax.make_mesh(sp=2))
document = [1 + i * 7 % 40 for i in range(200)]
session = engine.prefill([engine.prompt(document, [5, 6, 7])])
told = [session.ask(query, 4, stop_ids=()).tokens for query in ([8, 9], [11, 3, 40])]
both = [a.tokens for a in engine.generate([document, document[:160]], [[8, 9], [7, 7, 7]], 3, stop_ids=())]
try:
    session.save(Path(folder) / "saved")
except apb_jax.UserError as error:
    saved = str(error)
else:
    saved = ""
if place == 0:
    print(json.dumps({"asked": told, "batch": both, "saved": saved}))
"""


@pytest.mark.timeout(300)
def test_two_questions_and_a_batch_in_two_processes(command: list[str]) -> None:
    """A session is asked twice; a batch is answered; saving, which one process could only do in part, is refused."""
    folder, address = command[command.index("--model") + 1], f"127.0.0.1:{free_port()}"
    program = [sys.executable, "-c", TWO_QUESTIONS, address]
    pair = [start([*program, "2", str(place), folder]) for place in range(2)]
    first = outcome(pair[0])
    assert "{" not in pair[1].communicate(timeout=60)[0]
    alone = outcome(start([*program, "1", "0", folder]))
    assert first["asked"] == alone["asked"]
    assert first["batch"] == alone["batch"]
    assert len(first["asked"][0]) == 4
    assert first["saved"] == "a session over 2 processes cannot be saved; run it in one process"
    assert alone["saved"] == ""


@pytest.mark.timeout(300)
def test_a_mesh_that_leaves_unequal_shares_is_refused(command: list[str]) -> None:
    pair = together([*command, "--sp", "3"], XLA_FLAGS="--xla_force_host_platform_device_count=4")
    for process in pair:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "unequal shares; nearest legal choice: 2 devices" in err


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "many"}, 1),
    ],
)
def test_processes_that_a_launcher_started_need_no_coordinator(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], count: int
) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: joined.append(given))
    joining = Joining(None, None, None)
    joining.start()
    assert joining.count == count
    assert joined == ([(None, None, None)] if count > 1 else [])


def test_a_process_that_dies_ends_the_others(command: list[str]) -> None:
    """Within a minute, not after the collective's own time-out."""
    pair = together([*command, "--sp", "2", "--max-new-tokens", "4", "--repeat", "1000"])
    time.sleep(8)
    pair[1].kill()
    pair[1].communicate(timeout=30)
    began = time.monotonic()
    _, err = pair[0].communicate(timeout=100)
    assert time.monotonic() - began < 60
    assert pair[0].returncode != 0
    assert err.strip()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (
            ["--coordinator", "nonsense", "--processes", "2", "--process", "0"],
            "--coordinator is 'nonsense'; it must be",
        ),
        (["--processes", "2", "--process", "0"], "must be given together"),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "2"], "--process is 2; it must lie in 0..1"),
    ],
)
def test_wrong_words_about_processes(command: list[str], flags: list[str], rule: str) -> None:
    process = start([*command, *flags])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert rule in err
    assert len(err.strip().splitlines()) == 1

"""What a command meets around it: streams, devices, homes, pipes, signals; each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

RUN = [sys.executable, "-m", "apb_jax.run", "--seq", "512", "--max-new-tokens", "1", "--sp", "1"]


def surroundings(**changes: str | None) -> dict[str, str]:
    """The environment on a CPU, without a cache; None removes a variable."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "APB_JAX_CACHE": "off", "PYTHONPATH": str(ROOT)} | changes
    return {name: value for name, value in env.items() if value is not None and name != "XLA_FLAGS"}


def shell(line: str, **changes: str | None) -> tuple[int, str]:
    """(status, standard error) of a command in a shell."""
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=surroundings(**changes), timeout=120
    )
    return done.returncode, done.stderr


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


QUOTED = " ".join(f"'{part}'" for part in RUN)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{QUOTED} >&-", "standard output is closed"),
        (f"{sys.executable} -m evals data > /dev/full", "No space left on device"),
        (f"{QUOTED} --document - --query Who <&-", "there is no standard input"),
        (f"{QUOTED} --document - --query Who < /dev/zero", "longer than 64 MiB"),
        (f"{QUOTED} --document /dev/zero --query Who", "is a device; give a file"),
        (f"{QUOTED} --query $'caf\\xe9' --document x", "is not UTF-8 text"),
        (f"JAX_PLATFORMS=warp {QUOTED}", "JAX found no device (JAX_PLATFORMS is 'warp')"),
    ],
)
def test_streams_and_devices(line: str, says: str) -> None:
    status, error = shell(line)
    assert status == 2
    assert says in one_line(error)


def test_a_reader_that_went_away() -> None:
    """``| head``: the status says that not everything was written, without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "evals", "data"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        error = errors.read().decode()
    assert process.wait(60) == 2
    assert "standard output was closed" in one_line(error)


def test_an_ascii_terminal() -> None:
    """The picture is drawn in ASCII."""
    done = subprocess.run(RUN, capture_output=True, env=surroundings(PYTHONIOENCODING="ascii"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"#" in done.stdout
    assert done.stdout.isascii()
    assert b"Prediction: " in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a passwd entry")
def test_no_home_means_no_caches() -> None:
    code = (
        "import os, apb_jax.compile_cache as c; os.setuid(54321); "
        "assert c.cache_folder() is None and c.use_compile_cache() is None"
    )
    env = surroundings(HOME=None, XDG_CACHE_HOME=None, APB_JAX_CACHE=None, JAX_COMPILATION_CACHE_DIR=None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_evals(number: int, tmp_path: Path) -> None:
    program = ROOT / "tests" / "fake_system.py"
    line = ["ruler", "--model", "slow", "--method", "full", "--seq", "4k", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, str(program), *line], stderr=subprocess.PIPE, env=surroundings())
    rows = tmp_path / "r" / "full" / "predictions.jsonl"
    deadline = time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.decode().splitlines()[-1].startswith("error: interrupted; repeat the command")
    assert b"Traceback" not in error


def test_killed_training_leaves_no_workers(tmp_path: Path) -> None:
    """The workers end with their parent, told to end or without time to end them; two trainings at once."""
    workers: list[str] = []
    started = {
        number: subprocess.Popen(
            [sys.executable, "-m", "apb_jax.tiny.train", "--out", str(tmp_path / number.name), "--minutes", "5",
             "--workers", "2"],
            stderr=subprocess.DEVNULL, env=surroundings(),
        )
        for number in (signal.SIGKILL, signal.SIGTERM)
    }  # fmt: skip
    for number, process in started.items():
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 100
        while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        own = children.read_text().split()
        assert len(own) >= 2
        process.send_signal(number)
        process.wait(timeout=60)
        workers += own
    deadline = time.monotonic() + 20
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(_alive(worker) for worker in workers)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


COMMANDS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_of_benchmarks(path: Path) -> None:
    """``--help`` answers, and a mistake is one line, also where the GPU or torch is missing."""
    if path.stem in ("sanitize", "real_peer"):
        pytest.skip("takes no options: kernels for compute-sanitizer, a part of other benchmarks")
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        done = subprocess.run(
            [sys.executable, str(path), option], capture_output=True, text=True, env=surroundings(), timeout=120
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        if status:
            assert one_line(done.stderr)

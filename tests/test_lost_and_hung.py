"""What must not be lost (results, folders, data that was agreed on), and what must not hang or mislead."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_system
import jax
import pytest
from helpers import ROOT, told

from apb_jax import load, mesh, run
from apb_jax.command import OUT_OF_MEMORY, command
from apb_jax.errors import UserError
from apb_jax.retaining import train as heads_train
from apb_jax.tiny import FOLDER
from apb_jax.tiny import train as tiny_train
from converters import __main__ as converters

Main = Callable[[list[str]], int]
TINY = ["--model", "tiny", "--seq", "512", "--sp", "1", "--method", "full", "--max-new-tokens", "2", "--repeat", "0"]
FULL_DISK = os.strerror(errno.ENOSPC)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process leave nothing in the user's cache, and their flags do not outlast the test."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def never(*args: Any, **options: Any) -> None:
    raise AssertionError("what should have been refused was begun")


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, FULL_DISK, "kept/run.json"), UserError(f"kept/run.json cannot be written: {FULL_DISK}")],
    ids=["OSError", "UserError"],
)
def test_a_result_that_cannot_be_saved_is_still_printed(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of work must not go with the file: the JSON line comes before the saving."""

    def save(folder: Path, result: dict[str, Any]) -> None:
        raise failure

    monkeypatch.setattr("apb_jax.report.save", save)
    assert run.main([*TINY, "--json", "--save", str(tmp_path / "kept")]) == 2
    taken = capsys.readouterr()
    (line,) = taken.out.splitlines()
    result = json.loads(line)
    assert (result["model"], result["method"], len(result["tokens"])) == ("tiny", "full", 2)
    assert f"kept/run.json cannot be written: {FULL_DISK}" in told(taken.err) or f"{FULL_DISK}: kept" in told(taken.err)
    assert "saved: " not in taken.err


def test_a_full_disk_during_the_profile_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """XLA calls a full disk RESOURCE_EXHAUSTED, as it calls a full GPU: "use more devices" would mislead."""

    def stop() -> None:
        # As raised by jax 0.10 where the profile was written to a full file system.
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: now/vm.xplane.pb; {FULL_DISK}")

    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: None)
    monkeypatch.setattr("jax.profiler.stop_trace", stop)
    assert run.main([*TINY, "--json", "--profile", str(tmp_path / "profile")]) == 2
    taken = capsys.readouterr()
    result = json.loads(taken.out)
    assert len(result["tokens"]) == 2
    assert result["profile_error"].endswith(FULL_DISK)
    line = told(taken.err)
    assert line.startswith(f"error: --profile {tmp_path / 'profile'}: the trace could not be written: ")
    assert "memory" not in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_one(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A quota, too; where XLA speaks, its text alone says which."""

    @command("python -m any")
    def main(argv: list[str]) -> None:
        raise RuntimeError(f"RESOURCE_EXHAUSTED: /somewhere/vm.xplane.pb; {os.strerror(code)}")

    assert main([]) == 2
    assert told(capsys.readouterr().err).startswith(f"error: {os.strerror(code)}")


def test_the_option_is_named_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    given = ["--document", str(tmp_path / "taken"), "--save-session", str(tmp_path / "taken")]
    assert run.main([*TINY, *given]) == 2
    assert "--save-session " in told(capsys.readouterr().err)


# -- before the work --------------------------------------------------------------------------------------------------


def test_heads_are_not_trained_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out of apb_jax.retaining.train is a file; that it names a folder is said before the first step."""
    for name in ("load", "train", "read_records", "Checkpoints"):
        monkeypatch.setattr(heads_train, name, never)
    (tmp_path / "text.txt").write_text("A text. Of sentences.")
    out = tmp_path / "heads"
    out.mkdir()
    assert heads_train.main(["--model", "tiny", "--data", str(tmp_path / "text.txt"), "--out", str(out)]) == 2
    assert told(capsys.readouterr().err) == f"error: --out {out} is a folder; give the name of a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "text.txt"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--minutes", "nan", "--minutes is nan; it must be between 0 and 1000000.0, and finite"),
        ("--minutes", "inf", "--minutes is inf; it must be between 0 and 1000000.0, and finite"),
        ("--minutes", "0", "--minutes is 0; it must be"),
        ("--workers", "-1", "--workers is -1; it must be between 1 and 256 (nearest legal choice: 1)"),
        ("--workers", "0", "--workers is 0; it must be between 1 and 256 (nearest legal choice: 1)"),
    ],
)
def test_training_that_would_never_end_is_refused(
    option: str,
    value: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The clock never passes nan minutes, and without workers no batch ever comes."""
    monkeypatch.setattr(tiny_train, "_train", never)
    budget = [] if option == "--minutes" else ["--steps", "1"]
    assert tiny_train.main(["--out", str(tmp_path / "o"), *budget, f"{option}={value}"]) == 2
    assert says in told(capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


# -- simulated devices ------------------------------------------------------------------------------------------------


def test_a_thousand_simulated_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has threads and a copy of the weights: the machine would stand still before anything is said."""
    monkeypatch.setattr("apb_jax.weights.checkpoint.load", never)
    monkeypatch.setattr(mesh, "has_accelerator", lambda: False)
    assert run.main(["--model", "tiny", "--seq", "512", "--sp", "1024"]) == 2
    line = told(capsys.readouterr().err)
    assert "1024 simulated devices" in line
    assert f"nearest legal choice: {mesh.MOST_SIMULATED}" in line


def test_the_most_simulated_devices_are_a_legal_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal proposes is taken, one more is not, and a refusal leaves JAX's flags alone."""
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="65 simulated devices"):
        mesh.simulate_devices(mesh.MOST_SIMULATED + 1)
    assert os.environ["XLA_FLAGS"] == ""
    mesh.simulate_devices(mesh.MOST_SIMULATED)
    assert f"--xla_force_host_platform_device_count={mesh.MOST_SIMULATED}" in os.environ["XLA_FLAGS"].split()


@pytest.mark.parametrize(("copies", "fits"), [(3, True), (4, False)])
def test_copies_of_weights_fit_into_the_memory(copies: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused from the first copy that has no room; the number that is proposed is the largest with room."""
    gigabyte = 2**30
    monkeypatch.setattr(mesh, "free_host_memory", lambda: 10 * gigabyte)
    if fits:
        mesh.check_host_memory(3 * gigabyte, copies)
        return
    with pytest.raises(UserError, match=r"hold 12\.0 GiB of weights, .* 10\.0 GiB free; nearest legal choice: --sp 3$"):
        mesh.check_host_memory(3 * gigabyte, copies)


def test_a_silent_system_refuses_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "free_host_memory", lambda: None)
    mesh.check_host_memory(2**60, 64)


def test_copies_of_weights_are_counted_before_one_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever places them (run, evals, server, Python); there is room for one copy of the packaged model."""
    monkeypatch.setattr("apb_jax.weights.checkpoint.stream", never)
    monkeypatch.setattr(mesh, "free_host_memory", lambda: 40_000_000)
    assert run.main(["--model", "tiny", "--seq", "512", "--sp", "8", "--dtype", "float32"]) == 2
    line = told(capsys.readouterr().err)
    assert "8 simulated devices hold" in line
    assert "nearest legal choice: --sp 1" in line
    with pytest.raises(UserError, match="2 simulated devices hold"):
        load("tiny").place(mesh.make_mesh(2))


# -- out of memory ----------------------------------------------------------------------------------------------------


SPELLINGS = [
    RuntimeError("RESOURCE_EXHAUSTED: Error allocating 17179869184 bytes"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: see the driver"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Failed to allocate request for 2.00GiB on device ordinal 0"),
    RuntimeError("INTERNAL: Could not allocate 4294967296 bytes"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("Unable to allocate 8.00 EiB for an array with shape (1,)"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("cudaErrorMemoryAllocation in a launch"),
    RuntimeError("XLA:GPU OOM while compiling"),
    MemoryError(),
]


def raising(error: Exception) -> Main:
    @command("python -m nothing")
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize("error", SPELLINGS, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_every_spelling_of_out_of_memory(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with what to do about it, and the words of whoever ran out."""
    assert raising(error)([]) == 2
    line = told(capsys.readouterr().err)
    assert line.startswith("error: out of memory; use more devices (--sp, --tp), a shorter --seq, or --dtype bf16: ")
    assert line.endswith(str(error) or "MemoryError")


def test_every_spelling_is_tried_above() -> None:
    """One more in the pattern needs one more in the list: each text is known by exactly one of them."""
    spellings = OUT_OF_MEMORY.pattern.split("|")
    texts = [str(error) for error in SPELLINGS if str(error)]
    known = [[s for s in spellings if re.search(s, text, OUT_OF_MEMORY.flags)] for text in texts]
    assert all(len(found) == 1 for found in known), known
    assert {found[0] for found in known} == set(spellings)


@pytest.mark.parametrize("text", ["BOOM", "no room for 4 tokens", "allocated buffers differ", "memory_stats is None"])
def test_other_faults_keep_their_traceback(text: str) -> None:
    """A word that only looks like it must not hide a fault of the program behind advice about memory."""
    with pytest.raises(RuntimeError, match=text):
        raising(RuntimeError(text))([])


# -- permissions ------------------------------------------------------------------------------------------------------


TO_EVALUATE = ["needle", "--model", "regex", "--method", "full", "--seq", "1k"]
WRITERS: dict[str, tuple[Main, list[str]]] = {
    "run --save": (run.main, ["--model", "tiny", "--save"]),
    "run --save-session": (run.main, ["--document", str(ROOT / "README.md"), "--save-session"]),
    "run --profile": (run.main, ["--model", "tiny", "--profile"]),
    "retaining.train --out": (heads_train.main, ["--model", "tiny", "--data", "x", "--out"]),
    "tiny.train --out": (tiny_train.main, ["--steps", "1", "--out"]),
    "evals --out": (fake_system.run, [*TO_EVALUATE, "--out"]),
    "converters hf --out": (converters.main, ["hf", str(FOLDER), "--out"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_parent_without_write_permission_as_the_system_says_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write everywhere, so the system's refusal is played: nothing can be made below one folder."""
    parent = tmp_path / "locked"
    parent.mkdir()

    def refuse(call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any, *args: Any, **options: Any) -> Any:
            flags = args[0] if args and call is real_open else os.O_CREAT
            if str(path).startswith(str(parent)) and flags & (os.O_CREAT | os.O_TMPFILE):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **options)

        return asked

    real_open = os.open
    monkeypatch.setattr(os, "mkdir", refuse(os.mkdir))
    monkeypatch.setattr(os, "open", refuse(real_open))
    main, line = WRITERS[name]
    assert main([*line, str(parent / "new")]) == 2
    error = told(capsys.readouterr().err)
    assert str(parent / "new") in error
    assert "Permission denied" in error
    assert not list(parent.iterdir())


def test_a_parent_without_write_permission() -> None:
    """The real thing: a folder that others may look into; root becomes one of them in a process of its own."""
    code = (
        "import contextlib, io, os, sys, apb_jax.run as run\n"
        "with contextlib.redirect_stderr(io.StringIO()):\n"
        "    run.main(['--save', '/dev/null'])\n"  # imports what the next one needs: the packages may be root's own
        "os.geteuid() or os.setuid(54321)\n"
        "sys.exit(run.main(['--model', 'tiny', '--save', sys.argv[1]]))\n"
    )
    parent = Path(tempfile.mkdtemp())  # not below pytest's folder, which others may not enter
    try:
        parent.chmod(0o555)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, str(parent / "new")], capture_output=True, text=True, env=env, timeout=120
        )
        assert done.returncode == 2, done.stderr
        assert told(done.stderr) == f"error: --save {parent}/new cannot be written: Permission denied ({parent})"
        assert not list(parent.iterdir())
    finally:
        parent.chmod(0o755)
        shutil.rmtree(parent)

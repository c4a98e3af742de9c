"""A conversion killed at any of its file operations leaves nothing that loads, and can be repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hf_checkpoints import write_checkpoint

KILLER = """
import os, signal, sys
from pathlib import Path
from apb_jax.weights.checkpoint import load
from apb_jax.errors import UserError
from converters.convert import convert_model

source, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def child(work):
    pid = os.fork()  # JAX is imported but has no threads or devices yet
    if pid == 0:
        os._exit(work())
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def convert(out, last=0):
    touched = 0

    def hook(event, args):  # a clock that a busy machine does not shift: what the conversion does to files
        nonlocal touched
        if event.split(".")[0] in ("open", "os", "shutil") and args and str(args[0]).startswith(str(folder)):
            touched += 1
            if touched == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    convert_model(source, out)
    if not last:
        with open(folder / "touched", "w") as file:
            file.write(str(touched))
    return 0

def loads(out):
    try:
        load(out)
    except UserError:
        return 1
    return 0

assert status(child(lambda: convert(folder / "counting"))) == 0
whole = int((folder / "touched").read_text())
killed = 0
for number in range(kills):
    out = folder / f"out{number}"
    last = 1 + whole * number // kills
    found = status(child(lambda: convert(out, last)))
    assert found in (0, -signal.SIGKILL), found
    if found and not out.exists():
        killed += 1
        assert status(child(lambda: loads(out))) == 1
        for leftover in folder.glob(f"out{number}*"):
            assert status(child(lambda: loads(leftover))) == 1, leftover
        assert status(child(lambda: convert(out))) == 0
    assert status(child(lambda: loads(out))) == 0
    assert [p.name for p in folder.glob(f"out{number}*")] == [f"out{number}"]
print("killed", killed, "of", kills, "at one of", whole, "touches")
"""


def test_kills_leave_nothing_that_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", heads=True)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", KILLER, str(tmp_path / "in"), str(tmp_path / "work"), "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 8, done.stdout  # the last ones may come after the rename

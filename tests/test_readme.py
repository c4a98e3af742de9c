"""What the README claims of methods is what they say of themselves; its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from apb_jax.attention.__main__ import table
from apb_jax.options import parse

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python -m apb_jax\.run([^`\n#]*)", README)


def test_the_method_table_is_generated() -> None:
    """If this fails: replace the README's table by the output of ``python -m apb_jax.attention``."""
    assert table() in README


@pytest.mark.parametrize("line", [c for c in COMMANDS if "..." not in c])
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags exist and fit together, given the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w.-]+\.(?:txt|safetensors)", line):
        (tmp_path / name).write_text("text")
    assert parse(shlex.split(line)).model

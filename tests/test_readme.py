"""The README is true: its commands run, its picture and tables are generated; all pages have short lines and links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from apb_jax.attention.__main__ import table
from apb_jax.attention.picture import picture
from apb_jax.options import parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"```bash\n(.*?)```", README + USAGE, re.DOTALL))
COMMANDS = re.findall(r"python -m apb_jax\.run([^\n#]*)", SHELL)
PAGES = sorted(
    page.relative_to(ROOT)
    for top in (".", "apb_jax", "benchmarks", "converters", "docs", "evals", "pallas_kernels")
    for page in ((ROOT / top).glob("*.md") if top == "." else (ROOT / top).rglob("*.md"))
)


def run_as_newcomer(*arguments: str) -> str:
    """Standard output of Python in the project's folder, with none of this suite's settings of XLA."""
    hidden = {"XLA_FLAGS", "COLUMNS", "FORCE_COLOR"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_page_long() -> None:
    assert README.count("\n") <= 90
    assert len(re.findall(r"!\[", README)) == 1


def test_the_picture_is_generated() -> None:
    """If this fails: ``python -m apb_jax.attention.picture docs/pictures/apb_layout.svg``."""
    (name,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert (ROOT / name).read_text(encoding="utf-8") == picture()
    assert (ROOT / name).stat().st_size < 100_000


def test_the_method_table_is_generated() -> None:
    """If this fails: replace the table in docs/methods.md by the output of ``python -m apb_jax.attention``."""
    assert table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags exist and fit together, given the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w.-]+\.(?:txt|safetensors)", line):
        (tmp_path / name).write_text("text")
    assert parse(shlex.split(line)).model


def test_installs() -> None:
    """The extras that it names exist, and CI finds the command of the tests."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\.\[(\w+)\]", README))
    assert {"cuda13", "test", "serve"} <= named <= set(extras)
    assert re.findall(r"^pip install .*&& pytest$", README, re.MULTILINE) == ['pip install -e ".[test]" && pytest']


def test_the_first_command_shows_what_it_says() -> None:
    """The screen as printed, but for times and memory."""

    def shown(text: str) -> list[str]:
        return [re.sub(r" +[\d,.]+ (s|tok/s|ms/token|MiB)$", r" # \1", line) for line in text.strip().splitlines()]

    (screen,) = re.findall(r"```\n(no GPU here.*?)```", README, re.DOTALL)
    assert "python -m apb_jax.run\n```\n```\nno GPU here" in README
    assert shown(run_as_newcomer("-m", "apb_jax.run")) == shown(screen)


def test_the_python_block_runs_verbatim() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert run_as_newcomer("-c", block).split() == ["48151623.", "8675309."]


def without_code(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside of fenced code."""
    lines, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_prose_lines(page: Path) -> None:
    """At most 120 characters; tables, code and the targets of links are not counted."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = [(n, re.sub(r"\]\([^)]*\)", "]", line)) for n, line in without_code(text) if not line.startswith("|")]
    assert [(number, len(line)) for number, line in prose if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = "\n".join(line for _, line in without_code((ROOT / page).read_text(encoding="utf-8")))
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / page.parent / target).exists()] == []

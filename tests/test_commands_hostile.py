"""Hostile command lines: words and status 0 or 2, never a traceback, never half a file.

The lines are drawn from each parser's own options, so that a new option is attacked on the day it appears.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fake_system
import pytest

from apb_jax import calibrate, options, plan, run, sessions
from apb_jax.arguments import count, length, lengths, names, number, one_of, output_file, output_folder, size
from apb_jax.attention import __main__ as table_of_methods
from apb_jax.doctor import __main__ as doctor
from apb_jax.errors import UserError
from apb_jax.files import MARK
from apb_jax.measure import minference_search
from apb_jax.retaining import train
from apb_jax.serve import __main__ as serve
from apb_jax.serve import options as serve_options
from apb_jax.tiny import corpus, evaluate
from apb_jax.tiny import train as tiny_train
from benchmarks import tune
from converters import __main__ as converters
from evals import cli
from evals.__main__ import run as run_evals

HOSTILE = (
    "", " ", "nan", "inf", "-inf", "-1", "0", "1e999", "9" * 400, "2.5", "true", "None", "[]", "\0", "caf\udce9",
    ":100:", "[/bold]", "/dev/zero", "{fifo}", "{file}", "{file}/under", "{dir}", "x" * 300, "/proc/nope/x", "1,,2",
    "=", "a=b", "é", "{json}", "{binary}",
)  # fmt: skip
DRAWN = 12
"""Values for each option, of those above, spread by the option's place."""
DEEP = "[" * 5000
OWN = {
    "--rope": ("yarn", "yarn:", "yarn:nan", "yarn:-1", "yarn:0.5", "yarn:1e999", "yarn:4:4", "string:4", "llama3"),
    "--set": (
        f"a={DEEP}",
        "=1",
        "a",
        "1=2",
        "window_tokens=abc",
        "a=__import__('os')",
        f"a={'9' * 5000}",
        "full.a=[[[",
    ),
    "--template-arg": (f"a={DEEP}", "=1", "messages=1", "a b=1", f"a={'9' * 5000}", "a=1e999"),
    "--system": ("", " \n", "\ud800"),
    "--separator": ("\\", "\\n\\q", "\ud800"),
    "--placement": ("zig", "ZIGZAG", "zigzag,contiguous"),
    "--shards": ("0", "1025", "8.0", "-8", "3"),
    "--gpu-memory": ("80", "0g", "-1g", "1e9g", "9" * 400 + "g", "g", "80 gb"),
    "--keep-bytes": ("-1", "1e9", "9" * 400 + "t", "1.5.5g", "5gg"),
    "--device-bytes": ("0", "9" * 400, "2.5.5g"),
    "--repeat": ("-1", "1001", "1.0", "NaN"),
    "--save-session": ("{dir}", "{file}", "{file}/under", "/proc/nope", "x" * 300, "/dev/null"),
    "--session": ("{dir}", "{file}", "{json}", "{session}", "nope", "/dev/zero", "{fifo}"),
    "--coordinator": ("nope", "host:99999999", ":1", "[::1"),
    "--seed": ("-1", str(2**32), "1.5"),
    "--port": ("-1", "65536", "http"),
    "--host": ("", "a" * 300, "999.1.1.1"),
}
"""More values for options with a grammar of their own."""


@dataclass(frozen=True)
class Command:
    """A command, the parser whose options are drawn, and a line that is refused after every option was looked at."""

    main: Callable[[list[str]], int]
    parser: argparse.ArgumentParser
    line: tuple[str, ...]
    skips: tuple[str, ...] = ()
    drawn: int = DRAWN
    only: tuple[str, ...] = ()
    """The options that are drawn; none: all but ``skips``."""
    statuses: tuple[int, ...] = (0, 2)
    """Those that the command's help speaks of."""


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found


EVALS = commands_of(cli._parser())
CONVERT = commands_of(converters.parser())
SESSIONS = commands_of(sessions.make_parser())
TO_EVALUATE = ("--model", "regex", "--method", "full", "--seq", "512", "--out", "out")
COMMANDS = {
    "run": Command(run.main, options.make_parser(), ("--compare", "nope"), ("--compare",)),
    "run a model": Command(run.main, options.make_parser(), ("--model", "nope"), ("--model",), 3),
    "run a session": Command(
        run.main,
        options.make_parser(),
        ("--model", "tiny", "--query", "Who?", "--session", "nope"),
        (),
        9,
        ("--session",),
    ),
    "run and save a session": Command(
        run.main,
        options.make_parser(),
        ("--model", "nope", "--document", "{file}", "--save-session", "new"),
        (),
        len(HOSTILE),
        ("--save-session",),
    ),
    "plan": Command(plan.main, plan.make_parser(), ("--model", "nope", "--seq", "8k"), (), 8),
    "plan a model": Command(
        plan.main, plan.make_parser(), ("--model", "tiny", "--seq", "1k"), ("--model",), 6, statuses=(0, 1, 2)
    ),
    "serve": Command(
        serve.main, serve_options.make_parser(), ("--api-key-file", "nope", "--model", "nope"), ("--api-key-file",), 8
    ),
    "serve on a port": Command(
        serve.main,
        serve_options.make_parser(),
        ("--port", "0", "--model", "nope"),
        (),
        5,
        ("--host", "--port", "--api-key-file"),
    ),
    "doctor": Command(doctor.main, doctor.make_parser(), ("--no-self-test",), statuses=(0, 1, 2)),
    "attention": Command(table_of_methods.main, table_of_methods.make_parser(), ()),
    "tune": Command(tune.main, tune.make_parser(), ()),
    **{
        f"sessions {name}": Command(sessions.main, SESSIONS[name], (name, *line))
        for name, line in (
            ("list", ("{dir}",)), ("show", ("nope",)), ("remove", ("nope",)),
            ("prune", ("--keep-bytes", "50g", "{dir}")),
        )
    },
    "calibrate": Command(calibrate.main, calibrate.make_parser(), ("--model", "nope"), ("--model",)),
    "retaining.train": Command(
        train.main, train.make_parser(), ("--model", "nope", "--data", "nope", "--out", "o"), ("--data",)
    ),
    "tiny.train": Command(
        tiny_train.main,
        tiny_train.make_parser(),
        ("--out", "o", "--data", "nope", "--steps", "1"),
        ("--data", "--minutes"),
    ),
    "tiny.corpus": Command(corpus.main, corpus.make_parser(), ("--out", "o", "--data", "nope"), ("--data",)),
    "tiny.evaluate": Command(evaluate.main, evaluate.make_parser(), ("--out", "o", "--model", "nope"), ("--model",)),
    "minference_search": Command(
        minference_search.main, minference_search.make_parser(), ("--out", "o", "--model", "nope"), ("--model",)
    ),
    **{
        f"evals {name}": Command(fake_system.run, EVALS[name], (name, *TO_EVALUATE, *more), drawn=6)
        for name, more in (
            ("ruler", ("--samples", "1", "--tasks", "niah_single_1")),
            ("infinitebench", ("--samples", "1", "--data", "nope")),
            ("needle", ("--four", "1")),
            ("perplexity", ("--window", "64")),
            ("latency", ("--repeats", "1")),
        )
    },
    "evals score": Command(fake_system.run, EVALS["score"], ("score", "ruler", "--task", "vt", "nope")),
    "evals data": Command(run_evals, EVALS["data"], ("data",)),
    "evals report": Command(fake_system.run, EVALS["report"], ("report", "nope")),
    **{
        f"converters {name}": Command(converters.main, CONVERT[name], (name, "nope", *more), drawn=8)
        for name, more in (
            ("hf", ("--out", "o")), ("gguf", ("--out", "o")), ("heads", ("--out", "o")), ("export", ("--out", "o")),
            ("inspect", ()),
        )
    },
}  # fmt: skip


def drawn_lines(command: Command) -> Iterator[list[str]]:
    """Every option with ``drawn`` hostile values and those of OWN, behind the command's own line (the last of two
    counts); then every value in place of the last word of the line, where that is no option's.
    """
    for place, action in enumerate(command.parser._actions):
        names = action.option_strings
        left_out = names and names[0] not in command.only if command.only else set(names) & set(command.skips)
        if not names or action.nargs == 0 or left_out:
            continue
        drawn = [HOSTILE[(place * 7 + step * 11) % len(HOSTILE)] for step in range(command.drawn)]
        own = next((OWN[name] for name in names if name in OWN), ())
        for value in (*drawn, *own):
            yield [*command.line, f"{names[-1]}={value}"]
    if any(not action.option_strings and action.dest != "command" for action in command.parser._actions):
        for value in HOSTILE:
            yield [*command.line[:-1], value]
    yield [*command.line, "--no-such-option"]
    yield [*command.line, "caf\udce9"]


def how_many() -> int:
    return sum(len(list(drawn_lines(command))) for command in COMMANDS.values())


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, without network; what the values name lies beside it."""
    world, inside = tmp_path / "world", tmp_path / "inside"
    world.mkdir()
    inside.mkdir()
    os.mkfifo(world / "fifo")
    (world / "file").write_text("A text. Of sentences.", encoding="utf-8")
    (world / "json").write_text('{"cells": "none", "rows": [0], "results": NaN}', encoding="utf-8")
    (world / "binary").write_bytes(bytes(range(256)) * 4)
    (world / "dir").mkdir()
    (world / "session").mkdir()
    (world / "session" / "manifest.json").write_text(DEEP, encoding="utf-8")
    for name, value in (
        ("APB_JAX_CACHE", "off"), ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "")), ("HF_HUB_OFFLINE", "1"),
        ("XDG_CACHE_HOME", str(world / "cache")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(inside)
    return world


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_there_are_enough_lines() -> None:
    """Of every command some, and of every option that came later than the first round."""
    assert how_many() >= 2000
    assert all(len(list(drawn_lines(command))) >= 2 for command in COMMANDS.values())
    for name, flags in {
        "run": (
            "--rope", "--placement", "--virtual-shards", "--save-session", "--session", "--template-arg", "--system",
            "--separator", "--gpu-memory", "--repeat", "--coordinator",
        ),
        "plan": ("--gpus", "--gpu", "--gpu-memory", "--shards", "--placement", "--batch"),
        "serve": ("--max-body", "--queue", "--answers", "--device-bytes", "--cors-origin", "--grace", "--template-arg"),
        "serve on a port": ("--host", "--port", "--api-key-file"),
        "sessions prune": ("--keep-bytes",),
        "tune": ("--head-dim",),
        "evals ruler": ("--coordinator", "--processes", "--process", "--virtual-shards"),
    }.items():  # fmt: skip
        attacked = {line[-1].partition("=")[0] for line in drawn_lines(COMMANDS[name])}
        assert set(flags) <= attacked, name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_lines(name: str, sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, whole = Path.cwd(), sandbox.parent
    for line in drawn_lines(COMMANDS[name]):
        filled = [re.sub(r"\{(\w+)\}", lambda found: str(sandbox / found[1]), part) for part in line]
        before = listing(whole)
        status = COMMANDS[name].main(filled)
        error = capsys.readouterr().err
        assert status in COMMANDS[name].statuses, filled
        assert "Traceback" not in error, filled
        if status == 2:
            told = [row for row in error.splitlines() if row.startswith("error: ")]
            assert len(told) == 1, (filled, error)
            assert error.rstrip("\n").endswith(told[0]), (filled, error)
            assert len(told[0]) < 1200, filled
            assert listing(whole) == before, filled
        assert not [path for path in listing(whole) if MARK in path or path.endswith((".partial", ".tmp"))], filled
        for path in inside.iterdir():  # what a legal value wrote must not refuse the next line
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_values_of_every_type(text: str, sandbox: Path) -> None:
    """Every type of ``apb_jax.arguments`` refuses in argparse's or our own words, or gives what it says."""
    for kind in (
        count(0), count(1, 8), number(float, 0), number(float, 0, 1, above=True), length, lengths, names,
        one_of(("a", "b")), size(1), output_file, output_folder,
    ):  # fmt: skip
        try:
            value = kind(text)
        except (UserError, argparse.ArgumentTypeError):
            continue
        if isinstance(value, float):
            assert math.isfinite(value)
        if isinstance(value, int):
            assert 0 <= value < 2**60

"""Hostile command lines and Python arguments: words and status 0 or 2, never a traceback, never half a file.

The lines are drawn from each parser's own options, so that a new option is attacked on the day it appears.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fake_system
import numpy as np
import pytest
from hf_checkpoints import write_checkpoint

from apb_jax import calibrate, options, run
from apb_jax.arguments import count, length, lengths, names, number, one_of, output_file, output_folder
from apb_jax.errors import UserError
from apb_jax.files import MARK, to_json
from apb_jax.measure import minference_search
from apb_jax.measure.auto import Measurement, read_calibration
from apb_jax.measure.receipt import receipt
from apb_jax.mesh import make_mesh
from apb_jax.retaining import train
from apb_jax.sampling import Sampler
from apb_jax.tiny import corpus, evaluate
from apb_jax.tiny import train as tiny_train
from apb_jax.weights.checkpoint import load
from converters import __main__ as converters
from evals import cli

HOSTILE = (
    "", " ", "nan", "inf", "-inf", "-1", "0", "1e999", "9" * 400, "2.5", "true", "None", "[]", "\0", "caf\udce9",
    ":100:", "[/bold]", "/dev/zero", "{fifo}", "{file}", "{file}/under", "{dir}", "x" * 300, "/proc/nope/x", "1,,2",
    "=", "a=b", "é", "{json}", "{binary}",
)  # fmt: skip
DRAWN = 12
"""Values for each option, of those above, spread by the option's place."""


@dataclass(frozen=True)
class Command:
    """A command, the parser whose options are drawn, and a line that is refused after every option was looked at."""

    main: Callable[[list[str]], int]
    parser: argparse.ArgumentParser
    line: tuple[str, ...]
    skips: tuple[str, ...] = ()
    drawn: int = DRAWN


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found


EVALS = commands_of(cli._parser())
CONVERT = commands_of(converters.parser())
TO_EVALUATE = ("--model", "regex", "--method", "full", "--seq", "512", "--out", "out")
COMMANDS = {
    "run": Command(run.main, options.make_parser(), ("--compare", "nope"), ("--compare",)),
    "run a model": Command(run.main, options.make_parser(), ("--model", "nope"), ("--model",), 3),
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
    """Every option with ``drawn`` hostile values, behind the command's own line (the last of two counts)."""
    for place, action in enumerate(command.parser._actions):
        if not action.option_strings or action.nargs == 0 or action.option_strings[0] in command.skips:
            continue
        for step in range(command.drawn):
            value = HOSTILE[(place * 7 + step * 5) % len(HOSTILE)]
            yield [*command.line, f"{action.option_strings[-1]}={value}"]
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
    assert how_many() >= 600


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_lines(name: str, sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, whole = Path.cwd(), sandbox.parent
    for line in drawn_lines(COMMANDS[name]):
        filled = [part.format(**{p.name: p for p in sandbox.iterdir()}) if "{" in part else part for part in line]
        before = listing(whole)
        status = COMMANDS[name].main(filled)
        error = capsys.readouterr().err
        assert status in (0, 2), filled
        assert "Traceback" not in error, filled
        if status == 2:
            told = [row for row in error.splitlines() if row.startswith("error: ")]
            assert len(told) == 1, (filled, error)
            assert error.rstrip("\n").endswith(told[0]), (filled, error)
            assert len(told[0]) < 1200, filled
            assert listing(whole) == before, filled
        assert not [path for path in listing(whole) if MARK in path or path.endswith((".partial", ".tmp"))], filled
        for path in inside.iterdir():  # what a legal value wrote must not refuse the next line
            os.system(f"rm -rf -- '{path}'")


# -- Python -----------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1, 0, 2.5, 1 << 40, True, None, "", "x", "\0", b"x", [], {},
    np.float32("nan"), [[1]],
)  # fmt: skip


def refuses(call: Callable[[], Any]) -> None:
    """It works, or a UserError of one line says why not."""
    told = "in words"
    try:
        call()
    except UserError as error:
        told = str(error)
    assert told
    assert "\n" not in told


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_hostile_python_arguments(value: Any, sandbox: Path) -> None:
    for call in (
        lambda: Sampler(value, 1.0),
        lambda: Sampler(0.5, value),
        lambda: make_mesh(value),
        lambda: make_mesh(1, value) if value is not None else None,
        lambda: Measurement(value, 1, 1, 1.0) if isinstance(value, str) else Measurement("full", value, 1, 1.0),
        lambda: Measurement("full", 1, value, 1.0),
        lambda: Measurement("full", 1, 1, value),
        lambda: to_json({"a": [value]}) if isinstance(value, float | int | str | list | dict) else None,
        lambda: load(value) if isinstance(value, str) else None,
        lambda: load("nope", weights=value) if isinstance(value, str) else None,
    ):
        refuses(call)
    if isinstance(value, float | int) and not isinstance(value, bool):
        for field in fields(train.Recipe):
            if field.name not in ("seed",) and not (field.type == "int" and not isinstance(value, int)):
                refuses(lambda field=field: train.Recipe(**{field.name: value}))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_hostile_values_of_every_type(text: str, sandbox: Path) -> None:
    """Every type of ``apb_jax.arguments`` refuses in argparse's or our own words, or gives what it says."""
    for kind in (
        count(0), count(1, 8), number(float, 0), number(float, 0, 1, above=True), length, lengths, names,
        one_of(("a", "b")),        output_file, output_folder,
    ):  # fmt: skip
        try:
            value = kind(text)
        except (UserError, argparse.ArgumentTypeError):
            continue
        if isinstance(value, float):
            assert math.isfinite(value)
        if isinstance(value, int):
            assert 0 <= value < 2**31


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """One NaN in one tensor, or one infinity in the heads, is found while the weights enter."""
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint(tmp_path / "model", heads=True, dtype=np.float32)
    load(folder, dtype="float32").place(None)
    for file, bad in (("model.safetensors", np.nan), ("retaining_heads.safetensors", np.inf)):
        path = folder / file
        good = path.read_bytes()
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = bad
        save_file(tensors, path)
        with pytest.raises(UserError, match="holds 1 values that are NaN or infinite"):
            load(folder, dtype="float32").place(None)
        path.write_bytes(good)


def test_a_receipt_over_nan_is_an_error() -> None:
    logits = np.zeros((2, 4), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[1, 2] = bad
        for pair in ((broken, logits), (logits, broken)):
            with pytest.raises(UserError, match="logits hold NaN or infinity"):
                receipt(*pair, [1], [1])


def test_a_folder_named_like_a_preset_is_not_the_preset(tmp_path: Path) -> None:
    assert load(write_checkpoint(tmp_path / "tiny")).name == "./tiny"
    assert load(write_checkpoint(tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize("row", ['"x"', "0", '{"method": "full", "devices": 1, "tokens": 0, "prefill_s": 1}',
                                 '{"method": "full", "devices": 1, "tokens": 9, "prefill_s": 0}',
                                 '{"method": "nope", "devices": 1, "tokens": 9, "prefill_s": 1}',
                                 '{"method": "full", "devices": "8", "tokens": 9, "prefill_s": 1}',
                                 '{"method": "full", "devices": 1, "tokens": 9, "prefill_s": NaN}'])  # fmt: skip
def test_damaged_calibrations(tmp_path: Path, row: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(f'{{"device": "cpu", "rows": [{row}]}}', encoding="utf-8")
    with pytest.raises(UserError, match="is not a calibration"):
        read_calibration(path, "tiny")

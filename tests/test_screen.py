"""The live bar: something turns at every moment of a comparison, and nothing is left behind."""

from __future__ import annotations

import io
import re

import pytest
from helpers import ids, random_model
from rich.console import Console

import apb_jax
from apb_jax.measure.compare import Asking, beside, run_one
from apb_jax.screen import StageBar


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=24, legacy_windows=False)


def turning(bar: StageBar) -> list[str]:
    return [task.description for task in bar.progress.tasks if not task.finished]


def test_a_compilation_stops_turning_when_what_it_compiled_runs() -> None:
    """Also the second time, when both lines are there already."""
    bar = StageBar(terminal())
    for done in (1, 2):
        bar("compile prefill", 0, 1)
        assert turning(bar) == ["compile prefill"] if done == 1 else ["compile prefill", "prefill"]
        bar("prefill", done, 4)
        assert turning(bar) == ["prefill"]
    bar("query", 0, 1)
    assert turning(bar) == ["query"]


def test_another_method_turns_from_its_start() -> None:
    bar = StageBar(terminal())
    bar("prefill", 4, 4)
    assert turning(bar) == []
    bar.restart("ring")
    assert turning(bar) == ["start ring"]
    bar("compile prefill", 0, 1)
    assert turning(bar) == ["compile prefill"]


def test_every_part_of_a_comparison_says_so() -> None:
    """Between any two calls of the listener stands work that a line has announced."""
    stages: list[tuple[str, int, int]] = []
    engine = apb_jax.Engine(random_model(), "star", apb_jax.make_mesh(sp=2), progress=lambda *at: stages.append(at))
    other = engine.with_method("ring")
    asking = Asking(engine.prompt(ids(1, 120), ids(2, 5)), 2, stop_ids=(), mass=True)
    first = run_one(engine, asking)
    stages.clear()
    beside([engine, other], asking, first)
    names = [name for name, *_ in stages]
    for wanted in ("prefill, timed", "traffic", "receipt", "recovered mass"):
        begun = [at for at, (name, done, _) in enumerate(stages) if name == wanted and done == 0]
        assert len(begun) == 2, (wanted, names)


@pytest.mark.parametrize("narrow", [30, 50])
def test_a_narrower_window_leaves_nothing(narrow: int) -> None:
    """As many rows are taken back as the terminal has made of the lines that were there."""
    console = terminal(100)
    bar = StageBar(console)
    with bar:
        bar("load weights", 5, 10)
        bar("prefill", 1, 4)
        bar.progress.refresh()
        file = console.file
        assert isinstance(file, io.StringIO)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().rpartition("\r")[2]).splitlines()
        rows = sum(-(-len(line) // narrow) for line in shown)
        assert rows > len(shown) == 2
        file.seek(0)
        file.truncate()
        console.width = narrow
        bar.progress.refresh()
        assert file.getvalue().count("\x1b[1A\x1b[2K") == rows - 1

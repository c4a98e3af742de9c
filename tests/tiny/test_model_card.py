"""Tables of RULER and of the rivals (model card, README, docs/results.md) say what the measured scores say."""

from __future__ import annotations

import json
import re
from statistics import mean

import pytest
from helpers import ROOT

from apb_jax.attention.registry import METHODS
from apb_jax.tiny.evaluate import share

CARD = (ROOT / "apb_jax" / "tiny" / "README.md").read_text()
README = (ROOT / "README.md").read_text()
RESULTS_PAGE = (ROOT / "docs" / "results.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
RIVALS = json.loads((RESULTS / "tiny_card.json").read_text())["cells"]
CELLS = json.loads((RESULTS / "tiny_ruler.json").read_text())["cells"]
NEEDLES = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def score(method: str, task: str, tokens: int) -> float:
    return float(CELLS[f"{method}/{task}/{tokens}"]["score"])


def test_every_cell_was_measured() -> None:
    methods, tasks = ({key.split("/")[n] for key in CELLS} for n in (0, 1))
    assert len(tasks) == 13
    assert set(CELLS) == {f"{m}/{t}/{n}" for m in methods for t in tasks for n in (4096, 8192)}
    assert {cell["samples"] for cell in CELLS.values()} == {64}


@pytest.mark.parametrize("tokens", [4096, 8192])
def test_the_card(tokens: int) -> None:
    table = re.search(rf"^\| {tokens} tokens \| single 1 .*?\n\n", CARD, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *rows = table.group().strip().splitlines()
    tasks = [re.sub(r"^(single|multi)", r"niah_\1", name).replace(" ", "_") for name in cells_of(header)[1:-1]]
    assert [cells_of(row)[0] for row in rows] == list(dict.fromkeys(key.split("/")[0] for key in CELLS))
    for row in rows:
        method, *shown, average = cells_of(row)
        scores = [score(method, task, tokens) for task in tasks]
        assert shown == [f"{value:.0f}" for value in scores], method
        assert average == f"{mean(scores):.1f}", method


@pytest.mark.parametrize("text", [README, RESULTS_PAGE], ids=["readme", "results"])
def test_the_means(text: str) -> None:
    table = re.search(r"^\| \| full \|[^\n]*\n[^\n]*\n\| 4K .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *rows = table.group().strip().splitlines()
    for row in rows:
        length, *shown = cells_of(row)
        tokens = 1024 * int(length.removesuffix("K"))
        means = [mean(score(method, task, tokens) for task in NEEDLES) for method in cells_of(header)[1:]]
        assert shown == [f"{value:.1f}" for value in means]


@pytest.mark.parametrize("text", [CARD, RESULTS_PAGE], ids=["card", "results"])
def test_the_rivals(text: str) -> None:
    """Four tasks at 8K: shares and intervals of every method that was measured, full attention first."""
    table = re.search(r"^\| 8192 tokens \| single \| multikey .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *rows = table.group().strip().splitlines()
    tasks = [name for name in cells_of(header)[1:] if name != "measured on"]
    for row in rows:
        method, *shown = cells_of(row)
        assert shown[: len(tasks)] == [share(RIVALS[f"{method}/{task}/8192"]) for task in tasks], method
    methods = [cells_of(row)[0] for row in rows]
    assert methods[0] == "full"
    assert set(methods) == {c["method"] for c in RIVALS.values() if c["tokens"] == 8192} & {"apb-heads", *METHODS}

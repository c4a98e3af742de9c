"""The notebooks run from top to bottom on the packaged model."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the cells of a notebook printed."""
    flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "optimization_level" not in f)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # of the notebook machinery, not ours
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("quickstart.ipynb", tmp_path, monkeypatch)
    assert "answer:   8675309" in text
    assert "greedy_agreement" in text


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
def test_ask_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASK_MANY_TOKENS", "2000")
    text = run("ask_many.ipynb", tmp_path, monkeypatch)
    assert "10 of 10 right" in text
    assert "same answers: True" in text

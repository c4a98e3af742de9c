"""The notebook runs from top to bottom on the packaged model."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # of the notebook machinery, not ours
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "optimization_level" not in f)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "answer:   8675309" in text
    assert "greedy_agreement" in text

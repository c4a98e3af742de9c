"""Folders of evaluations: a refusal blocks no correction; a run goes on with the same data alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_system
import pytest
from helpers import told

from apb_jax.errors import UserError
from evals import cli
from evals.__main__ import run as run_evals
from evals.ruler import RulerTask
from evals.store import ROWS, RunFolder, read_rows

LATE = {
    "latency": (["latency", "--model", "small", "--repeats", "1", "--seq", "4k"], ["--seq", "2k"]),
    "perplexity": (["perplexity", "--model", "small", "--seq", "8k"], ["--seq", "2k"]),
}
"""Refused only when the run's folder is open, and what corrects it (the last of two options counts)."""


@pytest.mark.parametrize("benchmark", LATE)
def test_a_refused_run_does_not_block_its_correction(
    benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corrected command, into the same folder, must not hear of "another run"."""
    opened: list[bool] = []

    class Seen(RunFolder):
        def __enter__(self) -> RunFolder:
            opened.append((self.path / "config.json").exists())
            return super().__enter__()

    monkeypatch.setattr(cli, "RunFolder", Seen)
    monkeypatch.chdir(tmp_path)
    line, correction = LATE[benchmark]
    line = [*line, "--method", "full", "--out", "out/deep"]
    assert fake_system.run(line) == 2
    told(capsys.readouterr().err)
    assert opened == [True], "refused before the folder was open: this test needs a later refusal"
    assert not Path("out").exists()
    assert fake_system.run([*line, *correction]) == 0, capsys.readouterr().err
    assert len(list(read_rows(Path("out/deep/full")))) == 1


def test_a_refused_run_of_the_engine_does_not_block_its_correction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same through ``python -m evals`` and the packaged model, whose positions end before 64K."""
    line = ["latency", "--model", "tiny", "--method", "full", "--sp", "1", "--shards", "1", "--repeats", "1"]
    line += ["--warmups", "0", "--new-tokens", "1", "--out", str(tmp_path / "out")]
    assert run_evals([*line, "--seq", "64k"]) == 2
    assert "the longest legal length is" in told(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert run_evals([*line, "--seq", "256"]) == 0
    (row,) = read_rows(tmp_path / "out" / "full")
    assert (row["length"], row["generated_tokens"]) == (256, 1)


def test_a_refused_run_takes_nothing_that_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the user has in the folder stays, and so does the folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    line = ["latency", "--model", "small", "--method", "full", "--seq", "4k", "--out", str(tmp_path)]
    assert fake_system.run(line) == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_refusal_after_rows_keeps_the_rows(tmp_path: Path) -> None:
    """Only a run without a single row is cleared away: rows may have cost hours."""
    row = {"task": "vt", "length": 8, "id": "0"}

    def refused() -> None:
        with RunFolder(tmp_path / "run", {"seed": 1}) as folder:
            folder.append(row)
            raise UserError("later")

    with pytest.raises(UserError, match="later"):
        refused()
    assert list(read_rows(tmp_path / "run")) == [row]
    assert (tmp_path / "run" / "config.json").exists()


# -- data under the same name -----------------------------------------------------------------------------------------


def squad(first: str) -> dict[str, Any]:
    """A question file of the original layout whose first context begins with a word of its own."""
    texts = [f"{first} keeps lamp number {i} of the harbour. It burns until the morning." for i in range(3)]
    return {
        "data": [
            {"paragraphs": [{"context": text, "qas": [{"question": "Who?", "answers": [{"text": first}]}]}]}
            for text in texts
        ]
    }


HOTPOT = {"question": "Who?", "answer": "Ada", "context": [["Lamp", ["Ada keeps it."]]]}
DATA: dict[str, tuple[str, Any, Any]] = {
    "qa_1": ("dev-v2.0.json", squad("Ada"), squad("Bob")),
    "qa_2": ("hotpot_dev_distractor_v1.json", [HOTPOT], [HOTPOT | {"answer": "Bob"}]),
    "niah_single_2": ("PaulGrahamEssays.json", {"text": "One essay."}, {"text": "Another essay."}),
    "cwe": ("english_words.json", {"0": "lamp"}, {"0": "harbour"}),
}


@pytest.mark.parametrize("task", DATA)
def test_a_ruler_task_is_known_by_the_content_of_its_data(task: str, tmp_path: Path) -> None:
    """Equal contents in another folder are the same run, other contents under the same name are not."""
    name, one, other = DATA[task]
    facts = []
    for folder, content in (("a", one), ("b", one), ("c", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(content))
        facts.append(RulerTask(task, len, 4096, 1, data=tmp_path / folder).describe())
    assert facts[0]["data"]["file"] == name
    assert facts[0] == facts[1]
    assert facts[0] != facts[2]
    assert {k: v for k, v in facts[0].items() if k != "data"} == {k: v for k, v in facts[2].items() if k != "data"}


def test_ruler_goes_on_only_with_the_same_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers about two question files must not be averaged into one score; the rows that are there stay."""
    out = tmp_path / "out"
    line = ["ruler", "--model", "regex", "--method", "full", "--seq", "512", "--tasks", "qa_1", "--samples", "2"]
    rows = []
    for folder, first, status in (("a", "Ada", 0), ("b", "Ada", 0), ("c", "Bob", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev-v2.0.json").write_text(json.dumps(squad(first)))
        assert fake_system.run([*line, "--data", str(tmp_path / folder), "--out", str(out)]) == status
        rows.append((out / "full" / ROWS).read_text())
    assert "holds another run: tasks was" in told(capsys.readouterr().err)
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0].splitlines()) == 2

"""The recorded inputs of ../shared/cases, each through the whole command; its README says what is right."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_system
import numpy as np
import pytest
from helpers import ROOT

from apb_jax.generation import Generation
from apb_jax.run import main
from apb_jax.weights.checkpoint import load
from evals.infinitebench.records import read_records
from evals.store import read_rows

CASES = Path(os.environ.get("APB_CASES", ROOT.parent / "shared" / "cases"))


def case(name: str) -> Path:
    """The file of a case; the test is skipped where the cases do not lie beside the repository."""
    if not (CASES / name).is_file():
        pytest.skip(f"{CASES / name} is not there")
    return CASES / name


# -- emoji, whitespace ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run left: its screen, run.json and run.md."""

    screen: str
    saved: dict[str, Any]
    page: str


def answering(
    text: str, document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A run of the packaged model on a document, whose generated tokens are those of ``text``.

    The models of the reports are not here, so their answers stand in for what this one would choose.
    """
    tokens = load("tiny").tokenizer.encode(text, add_special_tokens=False)
    collect = Generation._collect
    monkeypatch.setattr(Generation, "_collect", lambda self, new: collect(self, np.asarray([tokens])))
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    line = ["--model", "tiny", "--sp", "1", "--method", "full", "--document", str(document), "--query", "Go on."]
    assert main([*line, "--max-new-tokens", "1", "--repeat", "0", "--save", str(folder)]) == 0
    saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert saved["tokens"] == tokens, "the answer is not the one that was asked for"
    return Run(capsys.readouterr().out, saved, (folder / "run.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", [":100:1", "rows[:x:2]", "urn:key:42"])
def test_the_screen_shows_what_the_file_holds(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich turned ``:100:`` into an emoji: in the streamed answer, in the prediction, and nowhere else."""
    document = case("emoji/document.txt")
    assert ":100:1\n" in document.read_text(encoding="utf-8")
    run = answering(text, document, tmp_path / "kept", monkeypatch, capsys)
    assert run.saved["prediction"] == text
    assert f"\nanswer {text} (cut: " in run.screen or f"\nanswer {text}\n" in run.screen
    assert f"\nPrediction: {text}\n" in run.screen
    assert run.page.endswith(f"\nPrediction: {text}\n")


def test_an_answer_of_one_newline_is_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the id of its token, which was shown instead."""
    run = answering("\n", case("whitespace/document.txt"), tmp_path / "kept", monkeypatch, capsys)
    assert len(run.saved["tokens"]) == 1
    assert run.saved["prediction"] == ""
    assert run.screen.splitlines()[-2] == "Prediction: "
    assert run.screen.splitlines()[-1].startswith("saved: ")
    assert run.page.endswith("\nPrediction: \n")


# -- odd records of InfiniteBench -------------------------------------------------------------------------------------


REFUSED = {
    0: "field 'options' holds 3 texts; the official prompt of longbook_choice_eng shows 4",
    1: "field 'answer': \"The keeper\" is none of the 4 options that the prompt shows",
    3: "field 'context' must be text, got null",
    4: "field 'answer' must be a number, got \"ten\"",
}
"""By line of the file: records that the official prompt or scorer cannot take."""
SCORED = {2: "q-17"}
"""By line of the file: records that can be scored, and their ids."""


def odd_records() -> list[dict[str, Any]]:
    text = case("infinitebench/odd_records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluate(odd: dict[str, Any], folder: Path) -> tuple[int, Path]:
    """(status, file) of a run of the record's task on the record alone."""
    file = folder / "data" / f"{odd['task']}.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(odd["record"]) + "\n", encoding="utf-8")
    line = ["infinitebench", "--model", "regex", "--method", "full", "--seq", "4k", "--tasks", odd["task"]]
    return fake_system.run([*line, "--data", str(file.parent), "--out", str(folder / "out")]), file


def test_every_record_has_a_right_value_here() -> None:
    assert sorted([*REFUSED, *SCORED]) == list(range(len(odd_records())))


@pytest.mark.parametrize("number", REFUSED)
def test_a_record_beyond_the_official_rule_is_one_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names file, line and field, and comes before the first sample."""
    status, file = evaluate(odd_records()[number], tmp_path)
    assert status == 2
    assert capsys.readouterr().err == f"error: {file}, line 1: {REFUSED[number]}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", SCORED)
def test_a_record_within_the_official_rule_is_scored(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id may be text; the right answer has the full score, and no text "None" gets into what is asked."""
    asked: list[str] = []

    def answer(self: fake_system.RegexSystem, document: str, query: str) -> str:
        asked.append(document + query)
        return "The keeper"

    monkeypatch.setattr(fake_system.RegexSystem, "_answer", answer)
    odd = odd_records()[number]
    status, file = evaluate(odd, tmp_path)
    assert status == 0
    (row,) = read_rows(tmp_path / "out" / "full")
    assert (row["score"], row["info"]["record"]) == (1.0, SCORED[number])
    (prompt,) = asked
    assert odd["record"]["context"] in prompt
    assert "None" not in prompt
    (record,) = read_records(odd["task"], file.parent)
    assert record.label == odd["record"]["answer"]

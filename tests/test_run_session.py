"""``--save-session`` and ``--session``: one run prefills, another asks; what does not fit is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apb_jax.measure import host_link
from apb_jax.run import main

FACT = "One of the magic numbers for long-context is: 8675309."
QUERY = "What is the magic number for long-context?"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night. " * 30 + FACT + " The wind went on. " * 30)
    return path


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_one_run_prefills_and_another_asks(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a question on 4 shards, then asked on 2 devices: as the run that did both answers."""
    folder, short = str(tmp_path / "s"), ["--max-new-tokens", "4", "--json"]
    assert main(["--document", str(book), "--save-session", folder, "--sp", "4", *short]) == 0
    made = result(capsys)
    assert made["method"] == "apb"
    assert made["notes"][0] == "prefilled without the question"
    assert "prediction" not in made
    again = str(tmp_path / "t")
    both = ["--document", str(book), "--save-session", again, "--sp", "4", "--set", "embed_query=false"]
    assert main([*both, "--query", QUERY, *short]) == 0
    expected = result(capsys)["prediction"]
    for further in ([], ["--document", str(book)]):
        assert main(["--session", folder, "--query", QUERY, "--sp", "2", *further, *short]) == 0
        assert result(capsys)["prediction"] == expected
    host = ["--session", folder, "--query", QUERY, "--sp", "2", "--kv", "host", *short]
    assert main(host) == 0
    taken = capsys.readouterr()
    assert json.loads(taken.out.splitlines()[-1])["prediction"] == expected
    assert "note: document KV in host memory: " in taken.err
    with monkeypatch.context() as patch:
        patch.setattr(host_link, "free_host_memory", lambda: 1000)
        assert main(host) == 2
    assert "of host memory, 0.0 GiB are free" in capsys.readouterr().err
    changed = tmp_path / "changed.txt"
    changed.write_text(book.read_text() + "And on.")
    for arguments, words in (
        (["--document", str(changed)], "tokens, the one given has"),
        (["--method", "ring"], "was saved with method 'apb', here it is 'ring'; nearest legal choice: --method apb"),
        (["--dtype", "bf16"], "was saved with dtype 'float32', here it is 'bfloat16'"),
        (["--rope", "string"], "was saved with rope"),
        (["--system", "Be brief.", "--template", "none"], "--system"),
        (["--separator", " "], "was saved with template"),
        (["--set", "passing_tokens=1"], "was saved with apb's passing_tokens"),
    ):
        assert main(["--session", folder, "--query", QUERY, "--sp", "2", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--session", "s"], "--session s comes without a question; add --query TEXT"),
        (["--save-session", "s"], "--save-session s comes without a document; add --document FILE"),
        (["--session", "s", "--query", "Who?", "--save-session", "t"], "give one of the two"),
        (["--session", "s", "--query", "Who?", "--compare", "full"], "--compare cannot be combined with --session"),
        (["--session", "s", "--query", "Who?", "--seq", "1k"], "--seq cannot be combined with --session"),
        (["--session", "s", "--query", "Who?", "--method", "auto"], "--method auto cannot be combined with --session"),
        (["--session", "/nowhere/s", "--query", "Who?"], "/nowhere/s is no saved session"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_method_that_needs_the_question_asks_for_it(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--document", str(book), "--save-session", str(tmp_path / "s"), "--method", "spava"]) == 2
    assert "method 'spava' prefills with the question; add --query TEXT" in capsys.readouterr().err

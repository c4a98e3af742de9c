"""Odd records, endless digits, cut characters, mixed data: a row, a right score or a line that names the place."""

import io
import json

import pytest
from fake_system import RegexSystem, run
from rich.console import Console

from apb_jax.tiny import FOLDER
from evals.base import EvalError, Example
from evals.infinitebench.prompts import PromptText, cut_middle
from evals.infinitebench.records import read_records
from evals.infinitebench.scoring import RULES, score_one
from evals.ruler import generate
from evals.runner import run_config, run_tasks
from evals.store import RunFolder, read_rows
from evals.tokens import as_tokens

OPTIONS = ["The keeper", "The cook", "Nobody", "The cat"]
RECORD = {"id": 0, "context": "The keeper lit the lamp.", "input": "Who?", "answer": ["The keeper"], "options": OPTIONS}


def write(folder, task: str, *records: dict):
    folder.mkdir(exist_ok=True)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(RECORD | record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("rule", RULES)
def test_runs_of_digits_are_scored(rule, digits):
    """Beyond a double's range (308 digits) and beyond what Python makes an int (4,300)."""
    run_of = "7" * digits
    assert score_one("math_find", run_of, 7, rule=rule) == 0.0
    assert score_one("math_find", run_of, 7.5, rule=rule) == 0.0
    assert score_one("code_run", f"it is {run_of}", 7, rule=rule) == 0.0
    assert score_one("code_run", "7" * 400, int("7" * 400), rule=rule) == 1.0
    if rule != "lm_eval":
        assert score_one("math_calc", f"7 {run_of} 7", [7, 7, 7], rule=rule) == pytest.approx(1 / 3)


class OneTask:
    """Two answers; the scorer takes those whose id is in ``good``."""

    name, metric, length = "odd", "exact", 64

    def __init__(self, *good: str):
        self.good = good

    def examples(self):
        for i in range(2):
            yield Example(str(i), "The magic number is: 12", "\nWhich?", ("12",), 8)

    def score(self, example, text):
        if example.id not in self.good:
            raise OverflowError("too large")
        return 1.0

    def describe(self):
        return {}


def run_one(path, task, screen=None):
    system = RegexSystem("full")
    console = Console(file=screen, force_terminal=True, width=100) if screen else Console(quiet=True)
    with RunFolder(path, run_config("odd", system, [task], None)) as folder:
        return run_tasks(system, [task], folder, samples=2 if screen else None, console=console, label="full")


def test_an_answer_that_cannot_be_scored_is_kept_and_says_so(tmp_path):
    """And counts as done on the bar, which ends full."""
    screen = io.StringIO()
    (result,) = run_one(tmp_path, OneTask("1"), screen)["results"]
    assert "100%" in screen.getvalue()
    assert "odd at 64: 100.0 (1 samples)" in screen.getvalue()
    assert (result["score"], result["samples"], result["unscored"]) == (100.0, 1, 1)
    rows = list(read_rows(tmp_path))
    assert [row["score"] for row in rows] == [None, 1.0]
    assert rows[0]["unscored"] == "OverflowError: too large"
    assert rows[0]["pred"] == "12"


def test_no_answer_that_can_be_scored_is_an_error_after_storing(tmp_path):
    with pytest.raises(EvalError, match=r"none of the 2 answers can be scored \(OverflowError: too large\)"):
        run_one(tmp_path, OneTask())
    assert len(list(read_rows(tmp_path))) == 2


@pytest.mark.parametrize(
    ("task", "record", "field"),
    [
        ("longbook_choice_eng", {"options": OPTIONS[:3]}, "field 'options' holds 3 texts"),
        ("longbook_choice_eng", {"options": [*"abcd", "The keeper"]}, "field 'answer': \"The keeper\" is none"),
        ("longbook_qa_eng", {"context": None}, "field 'context' must be text, got null"),
        ("longbook_qa_eng", {"input": 5}, "field 'input' must be text, got 5"),
        ("longbook_qa_eng", {"id": [1]}, "field 'id' must be a number or text"),
        ("longbook_qa_eng", {"answer": [3]}, "field 'answer' must be text"),
        ("math_find", {"answer": ["ten"]}, "field 'answer' must be a number, got \"ten\""),
        ("math_calc", {"answer": 5}, "field 'answer' must be a list of numbers, got 5"),
        ("code_run", {"answer": ["9" * 5000]}, "field 'answer' must be a number"),
        ("code_debug", {"options": "ABCD"}, "field 'options' must be a list of texts"),
        ("code_run", {"input": "what is it?", "answer": 5}, "code_run record 0: no call like func_12(-3) in its input"),
    ],
)
def test_odd_records_are_refused_by_file_line_and_field(tmp_path, capsys, task, record, field):
    good = [{}] if task.startswith("long") else []
    path = write(tmp_path / "data", task, *good, record)
    command = ["--model", "regex", "--method", "full", "--seq", "4k", "--tasks", task, "--data", str(path.parent)]
    assert run(["infinitebench", *command, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}, line {len(good) + 1}: {field}")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()  # said before the first sample


def test_what_the_official_rule_can_score_is_scored(tmp_path):
    write(tmp_path, "longbook_choice_eng", {"options": [*OPTIONS, "The dog"]})
    write(tmp_path, "longbook_qa_eng", {"id": "q-17"})
    (choice,) = read_records("longbook_choice_eng", tmp_path)
    assert choice.label == ["The keeper", "A"]
    (question,) = read_records("longbook_qa_eng", tmp_path)
    assert question.id == "q-17"


def test_an_odd_label_in_a_prediction_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "preds.jsonl"
    path.write_text(json.dumps({"prediction": "x", "ground_truth": [3]}) + "\n")
    command = ["score", "infinitebench", "--task", "longdialogue_qa_eng", "--rule", "string", str(path)]
    assert run(command) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 1: the answer [3] cannot be scored")


@pytest.mark.parametrize("most", range(120, 136))
def test_a_cut_leaves_whole_characters_and_never_more_tokens(most):
    """The packaged tokenizer spells Chinese in bytes, three tokens a character: most cuts go through one."""
    from tokenizers import Tokenizer

    tokens = as_tokens(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    text = "灯塔看守人点亮了灯。海上起了雾，船慢慢地驶来。" * 40
    prompt = PromptText(text, "\n谁点的灯？", "e")
    cut, facts = cut_middle(tokens, prompt, most)
    assert set(cut.document) <= set(text)
    assert most - 16 <= tokens.count(cut.document) + tokens.count(cut.query) <= most
    assert facts["tokens"] + facts["cut_tokens"] == tokens.count(text) + tokens.count(prompt.query)


BENCHMARKS = {
    "needle": ["needle", "--seq", "1k", "--depths", "2"],
    "four": ["needle", "--seq", "1k", "--four", "2"],
    "perplexity": ["perplexity", "--seq", "256", "--window", "64"],
    "latency": ["latency", "--seq", "256", "--repeats", "1", "--new-tokens", "1"],
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_run_goes_on_only_with_the_same_text(tmp_path, capsys, benchmark):
    text = tmp_path / "text.txt"
    common = ["--model", "regex", "--method", "full", "--out", str(tmp_path / "out"), "--text", str(text)]
    for words, status in (("one two three. ", 0), ("one two three. ", 0), ("four five six. ", 2)):
        text.write_text(words * 800)
        assert run([*BENCHMARKS[benchmark], *common]) == status
    assert "holds another run" in capsys.readouterr().err


def test_infinitebench_goes_on_only_with_the_same_records(tmp_path, capsys):
    for folder, context, status in (("a", "x", 0), ("b", "x", 0), ("c", "y", 2)):  # the folder's name does not matter
        path = write(tmp_path / folder, "longbook_qa_eng", {"context": f"{context} The keeper lit the lamp."})
        command = ["--model", "regex", "--method", "full", "--seq", "4k", "--tasks", "longbook_qa_eng"]
        assert run(["infinitebench", *command, "--data", str(path.parent), "--out", str(tmp_path / "out")]) == status
    assert "holds another run" in capsys.readouterr().err


def test_two_texts_of_one_stem_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(f"{name} " * 3000)
    texts = f"{tmp_path}/a/book.txt,{tmp_path}/b/book.txt"
    command = ["perplexity", "--model", "regex", "--method", "full", "--seq", "1k", "--text", texts]
    assert run([*command, "--out", str(tmp_path / "out")]) == 2
    assert "2 files are called 'book'" in capsys.readouterr().err


def test_variable_tracking_without_room_is_one_line(tmp_path, capsys):
    common = ["--model", "regex", "--method", "full", "--seq", "512", "--samples", "4", "--out", str(tmp_path)]
    assert run(["ruler", "--tasks", "vt", "--variant", "ruler_2024_06", *common]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: vt at 512, ruler_2024_06: ")
    assert message.count("\n") == 1
    with pytest.raises(EvalError, match="use a longer length"):
        list(generate("vt", lambda text: len(text.split()), 400, 1, variant="ruler_2024_06"))

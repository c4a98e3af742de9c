"""The command line: what it writes, and one clear line for every wrong input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_system import run

from apb_jax.arguments import lengths as parse_lengths
from apb_jax.errors import UserError

ROOT = Path(__file__).parents[2]
RULER_ROW = {"index": 0, "pred": "it is 12", "outputs": ["12"]}


def refused(capsys, *argv: str) -> str:
    """Run a command that must be refused; returns its one line."""
    assert run([str(part) for part in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err.removeprefix("error: ").strip()


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ruler_command(out: Path, *more: str) -> list[str]:
    return ["ruler", "--model", "regex", "--method", "full", "--seq", "4k", "--samples", "3", "--out", str(out), *more]


# -- wrong input ------------------------------------------------------------------------------------------------------


def test_a_typo_in_an_option_is_told_with_options_of_the_same_command(capsys, tmp_path):
    assert "did you mean --samples?" in refused(capsys, *ruler_command(tmp_path / "r", "--sample", "3"))
    line = refused(capsys, *ruler_command(tmp_path / "r", "--no-kvv"))  # latency alone has --no-kv
    assert "--no-kvv; see --help" in line


def test_a_typo_in_a_task_name(capsys, tmp_path):
    line = refused(capsys, *ruler_command(tmp_path / "r", "--tasks", "niah_singel_1"))
    assert "'niah_singel_1'; did you mean 'niah_single_1'?" in line
    assert not (tmp_path / "r").exists()
    line = refused(capsys, "score", "ruler", "--task", "qa1", write(tmp_path / "f.jsonl", RULER_ROW))
    assert "did you mean 'qa_1'?" in line
    line = refused(capsys, "score", "infinitebench", "--task", "passkeys", tmp_path / "f.jsonl")
    assert "did you mean 'passkey'?" in line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["rulr"], "unknown command 'rulr'; did you mean 'ruler'?"),
        (["needle", "--model", "regex", "--seq", "4q", "--out", "x"], "length '4q' is not a number of tokens"),
        (["needle", "--model", "regex", "--seq", "0", "--out", "x"], "length '0'"),
        (["needle", "--model", "regex", "--seq", "4k", "--outt", "x"], "--out"),
        (
            ["needle", "--model", "regex", "--seq", "4k", "--out", "x", "--depth", "0"],
            "did you mean --depths?",
        ),
        (["needle", "--model", "regex", "--seq", "4k", "--out", "x", "--form", "rulr"], "did you mean 'ruler'?"),
        (["needle", "--model", "regex", "--seq", "300", "--out", "x"], "the shortest legal length is 400"),
        (["needle", "--model", "regex", "--seq", "4k", "--out", "x", "--text", "nowhere"], "nowhere: no such file"),
        (["needle", "--model", "regex", "--seq", "4k", "--out", "x", "--method", ","], "--method names no method"),
        (["needle", "--model", "regex", "--seq", "4k", "--out", "x", "--set", "a.b"], "expected METHOD.NAME=VALUE"),
        (["perplexity", "--model", "regex", "--seq", "512", "--out", "x"], "use --window 256"),
        (["perplexity", "--model", "regex", "--seq", "4k", "--out", "x", "--protocol", "tale"], "did you mean 'tail'?"),
        (
            ["latency", "--model", "regex", "--seq", "4k", "--out", "x", "--repeats", "0"],
            "--repeats is 0; it must be between 1 and 100000",
        ),
        (["latency", "--model", "regex", "--seq", "4k", "--out", "x", "--baseline", "ful"], "unknown baseline"),
        (["infinitebench", "--model", "regex", "--seq", "4k", "--out", "x", "--rule", "apd"], "did you mean 'apb'?"),
        (["score", "rooler", "--task", "vt", "f"], "did you mean 'ruler'?"),
        (["report", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_options(capsys, argv, expected):
    assert expected in refused(capsys, *argv)


@pytest.mark.parametrize("option", [("--variant", "ruler_mian"), ("--wrapper", "lama3"), ("--splitter", "englisch")])
def test_wrong_ruler_choices_name_the_nearest(capsys, tmp_path, option):
    assert "did you mean" in refused(capsys, *ruler_command(tmp_path / "r", *option))
    assert "--samples is 0; it must be at least 1" in refused(capsys, *ruler_command(tmp_path / "r", "--samples", "0"))


def test_missing_data(capsys, tmp_path):
    line = refused(capsys, *ruler_command(tmp_path / "r", "--tasks", "qa_1"))
    assert "squad needed: pass --data DIR with dev-v2.0.json" in line
    line = refused(capsys, *ruler_command(tmp_path / "r", "--tasks", "qa_1", "--data", str(tmp_path)))
    assert "no squad file there" in line
    line = refused(capsys, *ruler_command(tmp_path / "r", "--tasks", "qa_1", "--data", str(tmp_path / "nowhere")))
    assert "no such folder" in line
    options = ["--model", "regex", "--seq", "4k", "--out", tmp_path / "r", "--data", tmp_path]
    assert "passkey.jsonl not there" in refused(capsys, "infinitebench", *options, "--tasks", "passkey")


def test_the_hub_out_of_reach(tmp_path):
    """Records are streamed from the Hub without --data; offline that is one line."""
    program = ROOT / "tests" / "fake_system.py"
    options = [
        "--model",
        "regex",
        "--method",
        "full",
        "--seq",
        "4k",
        "--tasks",
        "passkey",
        "--out",
        str(tmp_path / "r"),
    ]
    process = subprocess.run(
        [sys.executable, str(program), "infinitebench", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: InfiniteBench not reachable on the Hub")
    assert "pass --data DIR with passkey.jsonl" in process.stderr
    assert process.stderr.count("\n") == 1


def test_more_samples_than_questions(capsys, tmp_path):
    qas = [{"question": "Who?", "answers": [{"text": "I"}]}, {"question": "Why?", "answers": []}]
    squad = {"data": [{"paragraphs": [{"context": "I did it.", "qas": qas}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(squad))
    command = ruler_command(tmp_path / "r", "--tasks", "vt,qa_1", "--data", str(tmp_path))
    line = refused(capsys, *command)
    assert "3 samples asked, dev-v2.0.json holds 1 questions with an answer; use --samples 1" in line


def test_damaged_data(capsys, tmp_path):
    (tmp_path / "dev-v2.0.json").write_text("{")
    command = ruler_command(tmp_path / "r", "--tasks", "qa_1", "--data", str(tmp_path))
    assert "dev-v2.0.json: not a JSON file" in refused(capsys, *command)


def test_a_prompt_longer_than_the_models_positions(capsys, tmp_path):
    command = ["needle", "--model", "small", "--method", "full", "--seq", "2k,8k", "--out", tmp_path / "n"]
    line = refused(capsys, *command)
    assert "8192 tokens exceed the model's 4096 positions; the longest legal length is 4096" in line
    line = refused(capsys, "latency", "--model", "small", "--method", "full", "--seq", "4k", "--out", tmp_path / "l")
    assert "the longest legal length is 4064" in line
    line = refused(capsys, "perplexity", "--model", "small", "--method", "full", "--seq", "8k", "--out", tmp_path / "p")
    assert "exceed the model's 4096 positions" in line


def test_another_run_in_the_same_folder(capsys, tmp_path):
    assert run(ruler_command(tmp_path / "r", "--tasks", "passkey")) == 0
    capsys.readouterr()
    line = refused(capsys, *ruler_command(tmp_path / "r", "--tasks", "passkey", "--seed", "7"))
    assert "holds another run" in line


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prediction": "a", "outputs": ["a"]}, "no field 'pred'; nearest field there: 'prediction'"),
        ({"pred": "a", "output": ["a"]}, "nearest field there: 'output'"),
        ({"pred": "a", "outputs": []}, "a record with an empty answer"),
        ({"pred": "a", "outputs": [""]}, "a record with an empty answer"),
        ({"pred": None, "outputs": ["a"]}, "'pred' must be a string"),
    ],
)
def test_wrong_ruler_records(capsys, tmp_path, row, expected):
    path = write(tmp_path / "f.jsonl", RULER_ROW, row)
    line = refused(capsys, "score", "ruler", "--task", "vt", path)
    assert expected in line
    assert "line 2" in line


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("passkey", {"predicton": "1", "ground_truth": "1"}, "nearest field there: 'predicton'"),
        ("passkey", {"pred": "1", "truth": "1"}, "nearest field there: 'truth'"),
        ("passkey", {"pred": "1", "label": ""}, "a record with an empty answer"),
        ("code_debug", {"pred": "1", "label": "f"}, "must be [text, letter]"),
        ("math_find", {"pred": "1", "label": "7"}, "must be a number"),
    ],
)
def test_wrong_infinitebench_records(capsys, tmp_path, task, row, expected):
    path = write(tmp_path / "f.jsonl", row)
    assert expected in refused(capsys, "score", "infinitebench", "--task", task, path)


def test_wrong_prediction_files(capsys, tmp_path):
    path = write(tmp_path / "preds_vt.jsonl", RULER_ROW)
    line = refused(capsys, "score", "ruler", "--task", "vt", tmp_path / "pred_vt.jsonl")
    assert f"did you mean {path}?" in line
    (tmp_path / "broken.jsonl").write_text('{"pred": "a"\n')
    assert "broken.jsonl, line 1: not a JSON object" in refused(
        capsys, "score", "ruler", "--task", "vt", tmp_path / "broken.jsonl"
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no records" in refused(capsys, "score", "ruler", "--task", "vt", tmp_path / "empty.jsonl")
    other = write(tmp_path / "o.jsonl", {**RULER_ROW, "task": "cwe"})
    assert "it holds cwe" in refused(capsys, "score", "ruler", "--task", "vt", other)


# -- what the commands give -------------------------------------------------------------------------------------------


def scored(capsys, *argv) -> dict:
    assert run(["score", *map(str, argv), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_score_prints_one_json_line(capsys, tmp_path):
    path = write(tmp_path / "vt.jsonl", RULER_ROW, {"pred": "no", "outputs": ["12"]}, {"pred": "12", "outputs": ["12"]})
    expected = {"task": "vt", "metric": "string_match_all", "score": 66.67, "samples": 3}
    assert scored(capsys, "ruler", "--task", "vt", path) == expected
    assert run(["score", "ruler", "--task", "vt", str(path)]) == 0
    assert "vt: 66.67 (string_match_all, 3 samples, empty predictions 0)" in capsys.readouterr().out


def test_score_reads_the_originals_formats(capsys, tmp_path):
    # RULER's pieces of a task, in sorted order
    write(tmp_path / "cwe-0.jsonl", RULER_ROW)
    write(tmp_path / "cwe-1.jsonl", {"pred": "", "outputs": ["12"]})
    assert scored(capsys, "ruler", "--task", "cwe", tmp_path / "cwe.jsonl")["score"] == 50.0
    # STRING's log with its other lines
    log = tmp_path / "string.jsonl"
    log.write_text('step 1\n{"ctx_len": 9, "pred": "12", "needle": ["12"], "score": 100}\navg: 100\n')
    assert scored(capsys, "ruler", "--task", "niah_single_1", log)["samples"] == 1
    # several objects on a line
    many = tmp_path / "preds_passkey.jsonl"
    many.write_text('{"prediction": "1", "ground_truth": "1"} {"prediction": "2", "ground_truth": "1"}\n')
    assert scored(capsys, "infinitebench", "--task", "passkey", many)["score"] == 50.0
    # a first None reference zeroes a RULER task
    none = write(tmp_path / "none.jsonl", {"pred": "12", "outputs": [None]}, RULER_ROW)
    assert scored(capsys, "ruler", "--task", "vt", none)["score"] == 0.0


def test_score_follows_the_named_rule(capsys, tmp_path):
    path = write(tmp_path / "d.jsonl", {"prediction": "B is it", "label": ["f", "B"]})
    assert scored(capsys, "infinitebench", "--task", "code_debug", path)["score"] == 0.0
    assert scored(capsys, "infinitebench", "--task", "code_debug", "--rule", "string", path)["score"] == 100.0


def test_our_own_predictions_can_be_scored_again(capsys, tmp_path):
    assert run(ruler_command(tmp_path / "r", "--tasks", "vt,passkey,niah_single_1")) == 0
    capsys.readouterr()
    metrics = json.loads((tmp_path / "r" / "full" / "metrics.json").read_text())
    by_task = {result["task"]: result for result in metrics["results"]}
    for task in ("vt", "niah_single_1"):
        again = scored(capsys, "ruler", "--task", task, tmp_path / "r" / "full" / "predictions.jsonl")
        assert again["score"] == by_task[task]["score"] == 100.0


def test_the_configuration_says_what_was_run(capsys, tmp_path):
    assert run(ruler_command(tmp_path / "r", "--tasks", "vt", "--variant", "ruler_2024_06")) == 0
    config = json.loads((tmp_path / "r" / "full" / "config.json").read_text())
    assert config["system"] == {"model": "regex", "method": "full"}
    assert {"python", "jax", "numpy"} <= config["environment"].keys()
    (task,) = config["tasks"]
    assert (task["variant"], task["wrapper"], task["seed"], task["max_new_tokens"]) == ("ruler_2024_06", "base", 42, 30)


def test_without_data_the_rest_of_ruler_runs(capsys, tmp_path):
    assert (
        run(["ruler", "--model", "regex", "--method", "full", "--seq", "4k", "--samples", "1", "--out", str(tmp_path)])
        == 0
    )
    assert "without --data these tasks are left out: niah_single_2" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "full" / "metrics.json").read_text())
    assert {r["task"] for r in metrics["results"]} == {
        "niah_single_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "vt",
        "cwe",
        "fwe",
    }


def test_data_says_where_to_get_it(capsys):
    assert run(["data"]) == 0
    text = capsys.readouterr().out
    for name in ("dev-v2.0.json", "hotpot_dev_distractor_v1.json", "PaulGrahamEssays.json", "InfiniteBench"):
        assert name in text


def test_lengths():
    assert parse_lengths("4k, 8192,1M,4096") == (4096, 8192, 1048576)
    with pytest.raises(UserError):
        parse_lengths("4k,,8k")


def test_evals_knows_no_engine_outside_its_entry_points():
    """Only the system, its followers and the harness's task load a model; the rest knows options, files, documents."""
    allowed = {"system.py", "follow.py", "apb_ruler.py"}
    light = re.compile(
        r"apb_jax\.(errors|synthetic|json_text|arguments|command|files|install|joining|options|precision)\b"
    )
    for path in (ROOT / "evals").rglob("*.py"):
        imports = re.findall(
            r"^\s*(?:from|import) ((?:apb_jax|pallas_kernels|converters|jax)\b[\w.]*)", path.read_text(), re.M
        )
        assert path.name in allowed or all(light.match(name) for name in imports), (path, imports)


def test_the_program_ends_with_status_2(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "evals", "ruler", "--model", "nowhere", "--seq", "4k", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1

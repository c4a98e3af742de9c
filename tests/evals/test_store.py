"""Run folders: resuming after a kill, torn lines, other configurations, two writers."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_system import RegexSystem
from rich.console import Console

from evals.ahead import ahead, batches
from evals.base import EvalError
from evals.cli import main
from evals.ruler import RulerTask
from evals.runner import run_config, run_tasks
from evals.store import RunFolder, read_rows

PROGRAM = Path(__file__).parents[1] / "fake_system.py"
CONFIG = {"benchmark": "ruler", "seed": 1}
TIMES = ("prefill_s", "decode_s")


def row(index: int, text: str = "a") -> dict:
    return {"task": "vt", "length": 8, "id": str(index), "pred": text}


def without_times(folder: Path) -> list[dict]:
    return [{name: value for name, value in r.items() if name not in TIMES} for r in read_rows(folder)]


def run_command(out: Path) -> list[str]:
    arguments = ["--model", "slow", "--method", "full", "--seq", "1k,2k", "--samples", "12", "--tasks", "vt,passkey"]
    return [sys.executable, str(PROGRAM), "ruler", *arguments, "--variant", "ruler_fit", "--out", str(out)]


def test_five_kills_change_nothing(tmp_path):
    """SIGKILL at random moments; the resumed run equals an uninterrupted one, row for row."""
    subprocess.run(run_command(tmp_path / "whole"), check=True, capture_output=True)
    expected = without_times(tmp_path / "whole" / "full")
    assert len(expected) == 48

    rng, log = random.Random(time.time_ns()), tmp_path / "cut" / "full" / "predictions.jsonl"
    seen = []
    for _ in range(5):
        before = len(log.read_bytes()) if log.exists() else 0
        process = subprocess.Popen(run_command(tmp_path / "cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and (len(log.read_bytes()) if log.exists() else 0) <= before:
            time.sleep(0.01)  # it has begun to write
        time.sleep(rng.uniform(0, 0.08))
        assert process.poll() is None, "the run ended before it could be killed: slow the system down"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.append(len(log.read_text().splitlines()))
    assert seen == sorted(seen)
    assert seen[-1] < len(expected)
    subprocess.run(run_command(tmp_path / "cut"), check=True, capture_output=True)
    assert without_times(tmp_path / "cut" / "full") == expected
    metrics = [json.loads((tmp_path / name / "full" / "metrics.json").read_text()) for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_a_torn_last_line_is_computed_again(tmp_path):
    tasks = [RulerTask("passkey", RegexSystem().tokens, 1024, 4, variant="ruler_fit")]

    def run() -> RegexSystem:
        system = RegexSystem()
        with RunFolder(tmp_path, run_config("ruler", system, tasks, 4)) as folder:
            run_tasks(system, tasks, folder, samples=4, console=Console(quiet=True), label="x")
        return system

    assert run().calls == 4
    expected = without_times(tmp_path)
    log = tmp_path / "predictions.jsonl"
    log.write_bytes(log.read_bytes()[:-7])
    assert run().calls == 1
    assert without_times(tmp_path) == expected


def test_a_row_is_on_disk_when_append_returns(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(row(0, "línea\nnueva"))
        assert list(read_rows(tmp_path)) == [row(0, "línea\nnueva")]


def test_another_configuration_is_refused(tmp_path):
    RunFolder(tmp_path, CONFIG).__exit__()
    with pytest.raises(EvalError, match="seed was 1, now 2"):
        RunFolder(tmp_path, {**CONFIG, "seed": 2})


def test_the_time_of_start_may_differ(tmp_path):
    RunFolder(tmp_path, {**CONFIG, "started": "now"}).__exit__()
    RunFolder(tmp_path, {**CONFIG, "started": "later"}).__exit__()


def test_a_second_writer_is_refused(tmp_path):
    with RunFolder(tmp_path, CONFIG), pytest.raises(EvalError, match="another process"):
        RunFolder(tmp_path, CONFIG)


def test_a_damaged_line_in_the_middle_is_reported(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(row(0))
        folder.append(row(1))
    log = tmp_path / "predictions.jsonl"
    log.write_text(log.read_text().replace('"id": "0"', '"id" "0"'))
    with pytest.raises(EvalError, match="line 1: not a JSON object"):
        RunFolder(tmp_path, CONFIG)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "NaN", "[1]", '{"task": [1]}'])
def test_a_row_that_is_no_row_is_one_line(tmp_path, text):
    """Nested deeper than Python recurses, no object, or a key that cannot be one: an error that names the file."""
    with RunFolder(tmp_path / "run", {"benchmark": "needle"}):
        pass
    (tmp_path / "run" / "predictions.jsonl").write_text(text + "\n")
    with pytest.raises(EvalError, match=r"predictions\.jsonl"):
        RunFolder(tmp_path / "run", {"benchmark": "needle"}).__enter__()


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "predictions.jsonl"])
def test_a_report_over_deeply_nested_json_is_one_line(tmp_path, name, capsys):
    folder = tmp_path / "needle" / "full"
    with RunFolder(folder, {"benchmark": "needle"}):
        pass
    (folder / "metrics.json").write_text('{"results": [], "mean_by_length": {}}')
    (folder / name).write_text("[" * 100_000 + "\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")], connect=None) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_samples_are_prepared_ahead_in_order_and_no_further():
    made = []

    def source():
        for number in range(20):
            made.append(number)
            yield number

    items = ahead(source(), 3)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert made == list(range(len(made)))
    assert len(made) <= 5
    assert list(ahead(iter("abcde"), 3)) == list("abcde")
    assert list(batches("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_what_preparing_a_sample_raises_comes_in_its_turn():
    def source():
        yield 1
        raise EvalError("the second sample does not fit")

    items = ahead(source(), 4)
    assert next(items) == 1
    with pytest.raises(EvalError, match="second sample"):
        next(items)

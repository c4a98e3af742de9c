"""The generators and scorers against outputs recorded from the original programs."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from evals.infinitebench.scoring import RULES, score_one
from evals.ruler import TASKS, generate
from evals.ruler.scoring import METRICS
from evals.ruler.scoring import score_one as ruler_score
from evals.ruler.task import family_of
from evals.tokens import whitespace_counter

DATA = Path(__file__).parents[3] / "shared" / "data"


def case_files() -> list[Path]:
    """The recorded files and those named by APB_EVAL_CASES (separated as in PATH)."""
    found = [DATA / "ruler_conformance.json", DATA / "infinitebench_predictions_sample.jsonl"]
    extra = [Path(name) for name in os.environ.get("APB_EVAL_CASES", "").split(os.pathsep) if name]
    return [path for path in found if path.is_file()] + extra


def ruler_cases():
    for path in case_files():
        if path.suffix != ".json":
            continue
        for variant, block in json.loads(path.read_text())["variants"].items():
            for task, rows in block["tasks"].items():
                yield pytest.param(variant, block, task, rows, id=f"{path.stem}-{variant}-{task}")


def prediction_rows():
    for path in case_files():
        if path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                yield path.stem, json.loads(line)


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


@pytest.mark.skipif(not case_files(), reason="no recorded cases: ../shared/data is absent and APB_EVAL_CASES unset")
def test_the_recorded_files_hold_every_task():
    recorded = {(case.values[0], case.values[2]) for case in ruler_cases()}
    assert {task for _, task in recorded} == set(TASKS)
    assert len({variant for variant, _ in recorded}) == 3


@pytest.mark.parametrize(("variant", "block", "task", "rows"), list(ruler_cases()))
def test_prompts_are_byte_identical(variant, block, task, rows):
    wrapper = block["chat_template"].split()[0]
    stream = generate(
        task,
        whitespace_counter,
        block["max_seq_length"],
        len(rows),
        seed=block.get("random_seed", 42),
        variant=variant,
        wrapper=wrapper,
        data=DATA,
    )
    for row, example in zip(rows, stream, strict=True):
        assert list(example.references) == row["outputs"]
        assert example.info["length"] == row["length"]
        if "md5_prompt" in row:
            assert md5(example.prompt) == row["md5_prompt"]
        else:
            assert (md5(example.document), md5(example.query)) == (row["md5_context"], row["md5_query"])


def test_scores_equal_the_recorded_ones():
    """Every row that carries a score: InfiniteBench rows one per rule, RULER rows with their official score."""
    checked, wrong = 0, []
    for stem, row in prediction_rows():
        if "scores" in row:
            for rule, expected in row["scores"].items():
                assert rule in RULES
                got = score_one(row["task"], row["prediction"], row["ground_truth"], rule=rule)
                checked += 1
                if abs(got - expected) > 1e-6:
                    wrong.append((stem, row["task"], row["model"], row["id"], rule, expected, got))
        elif "outputs" in row and "score" in row:
            got = ruler_score(METRICS[family_of(row["task"])], row["pred"], row["outputs"])
            checked += 1
            if abs(got - row["score"]) > 1e-6:
                wrong.append((stem, row["task"], row.get("index"), row["score"], got))
    if not checked:
        pytest.skip("no recorded predictions: ../shared/data is absent and APB_EVAL_CASES unset")
    assert not wrong

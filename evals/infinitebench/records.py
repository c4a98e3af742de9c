"""InfiniteBench records: reading them, and the facts of the twelve tasks."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from evals.base import EvalError, require_choice

HUB_NAME = "xinrongzhang2022/InfiniteBench"

# New tokens: official, STRING and APB; then MInference.
NEW_TOKENS = {
    "passkey": (6, 15),
    "number_string": (12, 20),
    "kv_retrieval": (50, 80),
    "longdialogue_qa_eng": (40, 40),
    "longbook_sum_eng": (1200, 1200),
    "longbook_choice_eng": (40, 40),
    "longbook_qa_eng": (40, 40),
    "longbook_qa_chn": (40, 40),
    "math_find": (3, 3),
    "math_calc": (30000, 30000),
    "code_run": (5, 5),
    "code_debug": (5, 5),
}
TASKS = tuple(NEW_TOKENS)
CHOICE_TASKS = ("longbook_choice_eng", "code_debug")

# Which tasks a project's published average holds.
AVERAGES = {
    "official": TASKS,
    "minference": tuple(t for t in TASKS if t not in ("code_run", "math_calc")),
    "apb": tuple(t for t in TASKS if t not in ("code_run", "math_calc")),
    "string": tuple(t for t in TASKS if t != "longbook_qa_chn"),
}


@cache
def templates() -> dict[str, Any]:
    return json.loads(files("evals.infinitebench").joinpath("templates.json").read_text(encoding="utf-8"))


def cjk_punctuation() -> str:
    return templates()["cjk_punctuation"]


@dataclass(frozen=True)
class Record:
    """One InfiniteBench record; ``label`` is the reference the scorers take."""

    id: int
    context: str
    input: str
    label: Any
    options: tuple[str, ...] = ()


def make_record(task: str, row: Mapping[str, Any], where: str) -> Record:
    """Check a raw row and bring its answer into the scorers' form (``datasets`` makes every answer a string)."""
    for name in ("context", "input", "answer"):
        if name not in row:
            raise EvalError(f"{where}: field {name!r} missing (it has: {', '.join(row)})")
    options = tuple(row.get("options") or ())
    label = _label(task, row["answer"], options, where)
    return Record(int(row.get("id", 0)), row["context"], row["input"], label, options)


def _label(task: str, answer: Any, options: tuple[str, ...], where: str) -> Any:
    if answer in (None, "", []) or answer == [""]:
        raise EvalError(f"{where}: a record with an empty answer cannot be scored")
    if task in CHOICE_TASKS:
        if isinstance(answer, list) and len(answer) == 2 and answer[1] in "ABCD":
            return answer
        text = answer[0] if isinstance(answer, list) else answer
        if text not in options:
            raise EvalError(f"{where}: the answer {text!r} is none of the options {list(options)}")
        return [text, "ABCD"[options.index(text)]]
    if task in ("math_find", "code_run"):
        value = answer[0] if isinstance(answer, list) else answer
        return _number(value) if isinstance(value, str) else value
    if task == "math_calc":
        values = answer[0] if isinstance(answer[0], list) else answer
        return [int(value) for value in values]
    if task == "kv_retrieval" and isinstance(answer, list):
        return answer[0]
    return answer


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def parse_objects(line: str, where: str) -> Iterator[dict]:
    """The JSON objects of one line; some published files hold several."""
    decoder, place = json.JSONDecoder(), 0
    line = line.strip()
    while place < len(line):
        try:
            value, place = decoder.raw_decode(line, place)
        except ValueError as error:
            raise EvalError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(value, dict):
            raise EvalError(f"{where}: expected a JSON object, got {type(value).__name__}")
        yield value
        while place < len(line) and line[place] in " \t,":
            place += 1


def read_records(task: str, data: str | Path | None) -> Iterator[Record]:
    """Stream a task's records from ``<data>/<task>.jsonl``, or from the Hub through ``datasets`` if data is None."""
    require_choice("InfiniteBench task", task, TASKS)
    rows = _hub_rows(task) if data is None else _file_rows(Path(data), task)
    for number, row in enumerate(rows):
        record = make_record(task, row, f"{task} record {number}")
        yield record


def _file_rows(folder: Path, task: str) -> Iterator[dict]:
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise EvalError(f"--data {folder}: {task}.jsonl not there (`python -m evals data` says where to get it)")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield from parse_objects(line, f"{path}, line {number}")


def _hub_rows(task: str) -> Iterator[dict]:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "context": datasets.Value("string"),
            "input": datasets.Value("string"),
            "answer": datasets.Sequence(datasets.Value("string")),
            "options": datasets.Sequence(datasets.Value("string")),
        }
    )
    try:
        yield from datasets.load_dataset(HUB_NAME, features=features, split=task, streaming=True)
    except (OSError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise EvalError(
            f"InfiniteBench not reachable on the Hub ({type(error).__name__}): pass --data DIR with {task}.jsonl in it"
        ) from error

"""InfiniteBench records: reading them, and the facts of the twelve tasks."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
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
LETTERS = "ABCD"
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

    id: int | str
    context: str
    input: str
    label: Any
    options: tuple[str, ...] = ()


def make_record(task: str, row: Mapping[str, Any], where: str) -> Record:
    """Check a raw row and bring its answer into the scorers' form (``datasets`` makes every answer a string).

    Raises:
      EvalError: a field that is missing or of a form that the official prompts or scorers cannot take; the line names
        ``where`` and the field.
    """
    for name in ("context", "input", "answer"):
        if name not in row:
            raise EvalError(f"{where}: field {name!r} missing (it has: {', '.join(row)})")
    for name in ("context", "input"):
        if not isinstance(row[name], str):
            raise EvalError(f"{where}: field {name!r} must be text, got {_shown(row[name])}")
    identity = row.get("id", 0)
    if not isinstance(identity, int | str):
        raise EvalError(f"{where}: field 'id' must be a number or text, got {_shown(identity)}")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise EvalError(f"{where}: field 'options' must be a list of texts, got {_shown(options)}")
    if task in CHOICE_TASKS and len(options) < len(LETTERS):
        raise EvalError(f"{where}: field 'options' holds {len(options)} texts; the official prompt of {task} shows 4")
    label = _label(task, row["answer"], tuple(options), where)
    return Record(identity, row["context"], row["input"], label, tuple(options))


def _label(task: str, answer: Any, options: tuple[str, ...], where: str) -> Any:
    if answer in (None, "", []) or answer == [""]:
        raise EvalError(f"{where}: field 'answer': a record with an empty answer cannot be scored")
    first = answer[0] if isinstance(answer, list) else answer
    if task in CHOICE_TASKS:
        if isinstance(answer, list) and len(answer) == 2 and answer[1] in tuple(LETTERS):
            return answer
        if first not in options[: len(LETTERS)]:
            raise EvalError(
                f"{where}: field 'answer': {_shown(first)} is none of the {len(LETTERS)} options that the prompt shows"
            )
        return [first, LETTERS[options.index(first)]]
    if task in ("math_find", "code_run"):
        return _number(first, where)
    if task == "math_calc":
        if not isinstance(answer, list):
            raise EvalError(f"{where}: field 'answer' must be a list of numbers, got {_shown(answer)}")
        values = [_number(value, where) for value in (first if isinstance(first, list) else answer)]
        return [int(value) for value in values]
    texts = answer if isinstance(answer, list) else [answer]
    if task not in ("passkey", "number_string") and not all(isinstance(text, str) for text in texts):
        raise EvalError(f"{where}: field 'answer' must be text or a list of texts, got {_shown(answer)}")
    if task == "kv_retrieval":
        return first
    return answer


def _number(value: Any, where: str) -> int | float:
    """A number, or the number that a text spells in decimal digits."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,400}(\.[0-9]{0,400})?", value.strip()):
        return float(value) if "." in value else int(value)
    raise EvalError(f"{where}: field 'answer' must be a number, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_objects(line: str, where: str) -> Iterator[dict]:
    """The JSON objects of one line; some published files hold several."""
    decoder, place = json.JSONDecoder(), 0
    line = line.strip()
    while place < len(line):
        try:
            value, place = decoder.raw_decode(line, place)
        except (ValueError, RecursionError) as error:
            raise EvalError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(value, dict):
            raise EvalError(f"{where}: expected a JSON object, got {type(value).__name__}")
        yield value
        while place < len(line) and line[place] in " \t,":
            place += 1


def read_records(task: str, data: str | Path | None) -> Iterator[Record]:
    """Stream a task's records from ``<data>/<task>.jsonl``, or from the Hub through ``datasets`` if data is None."""
    require_choice("InfiniteBench task", task, TASKS)
    for where, row in _hub_rows(task) if data is None else _file_rows(Path(data) / f"{task}.jsonl"):
        yield make_record(task, row, where)


@cache
def checked(task: str, path: Path, read: Callable[[str, Record], object]) -> str:
    """SHA-256 of a task's file, once every record in it has been read: a bad one is said before hours are spent.

    ``read``: (task, record) of what a prompt takes from it, which may be missing, too.
    """
    for where, row in _file_rows(path):
        record = make_record(task, row, where)
        try:
            read(task, record)
        except EvalError as error:
            raise EvalError(f"{where}: {error}") from error
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of every record."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                for row in parse_objects(line, where):
                    yield where, row
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _hub_rows(task: str) -> Iterator[tuple[str, dict]]:
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
        stream = datasets.load_dataset(HUB_NAME, features=features, split=task, streaming=True)
        for number, row in enumerate(stream):
            yield f"{HUB_NAME}, {task} record {number}", row
    except (OSError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise EvalError(
            f"InfiniteBench not reachable on the Hub ({type(error).__name__}): pass --data DIR with {task}.jsonl in it"
        ) from error

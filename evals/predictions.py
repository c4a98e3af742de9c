"""Scores predictions made elsewhere, in the originals' file formats."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apb_jax.files import check_input, near_file
from evals.base import UNSCORABLE, EvalError, mean_percent, require_choice
from evals.infinitebench import records, scoring
from evals.ruler.scoring import METRICS, task_score
from evals.ruler.task import EXTRA_TASKS, TASKS, family_of

# Field names by role, in the order in which the originals look for them.
RULER_FIELDS = {"prediction": ("pred",), "references": ("outputs", "needle")}
INFINITEBENCH_FIELDS = {"prediction": ("prediction", "pred"), "references": ("ground_truth", "label")}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every JSON object; several on a line and STRING's ``step``/``avg:`` lines are accepted."""
    with check_input(path, "the file").open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip() or line.startswith(("step", "avg:")):
                    continue
                where = f"{path}, line {number}"
                for row in records.parse_objects(line, where):
                    yield where, row
        except UnicodeDecodeError as error:
            raise EvalError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _chunks(path: Path) -> list[Path]:
    """The file, or the pieces ``<stem>-<n><suffix>`` of a task that was cut for several workers."""
    if path.is_file():
        return [path]
    pieces = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")) if path.parent.is_dir() else []
    if pieces:
        return pieces
    raise EvalError(f"{path}: no such file{near_file(path)}")


def _field(row: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    near = [n for name in names for n in difflib.get_close_matches(name, row, n=1, cutoff=0.4)]
    hint = f"; nearest field there: {near[0]!r}" if near else ""
    raise EvalError(f"{where}: no field {' or '.join(map(repr, names))}{hint} (it has: {', '.join(row)})")


def _rows_of_task(path: Path, task: str) -> list[tuple[str, dict[str, Any]]]:
    found = [item for piece in _chunks(path) for item in read_rows(piece)]
    if not found:
        raise EvalError(f"{path}: the file holds no records")
    named = [(where, row) for where, row in found if row.get("task", task) == task]
    if not named:
        held = sorted({str(row["task"]) for _, row in found})
        raise EvalError(f"{path}: no record of task {task!r}; it holds {', '.join(held)}")
    return named


def score_file(benchmark: str, task: str, path: str | Path, rule: str = "official") -> dict[str, Any]:
    """``{"task", "metric", "score" (0..100, two decimals), "samples"}`` of a prediction file.

    Raises:
      EvalError: unknown task, missing file or field, a record with an empty answer; the line says which.
    """
    return {"ruler": _score_ruler, "infinitebench": _score_infinitebench}[benchmark](task, Path(path), rule)


def _score_ruler(task: str, path: Path, rule: str) -> dict[str, Any]:
    require_choice("RULER task", task, (*TASKS, *EXTRA_TASKS))
    predictions, references = [], []
    for where, row in _rows_of_task(path, task):
        prediction = _field(row, RULER_FIELDS["prediction"], where)
        expected = _field(row, RULER_FIELDS["references"], where)
        expected = [expected] if isinstance(expected, str) else expected
        if not isinstance(prediction, str):
            raise EvalError(f"{where}: 'pred' must be a string, got {json.dumps(prediction)[:60]}")
        if not isinstance(expected, list) or not expected or any(r == "" for r in expected):
            raise EvalError(f"{where}: a record with an empty answer cannot be scored (outputs {json.dumps(expected)})")
        predictions.append(prediction)
        references.append(expected)
    metric = METRICS[family_of(task)]
    return {
        "task": task,
        "metric": f"string_match_{metric}",
        "score": task_score(metric, predictions, references),
        "samples": len(predictions),
        "empty_predictions": sum(not p.strip() for p in predictions),
    }


def _score_infinitebench(task: str, path: Path, rule: str) -> dict[str, Any]:
    require_choice("InfiniteBench task", task, records.TASKS)
    require_choice("scoring rule", rule, scoring.RULES)
    scores = []
    for where, row in _rows_of_task(path, task):
        prediction = _field(row, INFINITEBENCH_FIELDS["prediction"], where)
        label = _field(row, INFINITEBENCH_FIELDS["references"], where)
        if label in (None, "", []):
            raise EvalError(f"{where}: a record with an empty answer cannot be scored")
        if not isinstance(prediction, str):
            raise EvalError(f"{where}: the prediction must be a string, got {json.dumps(prediction)[:60]}")
        if task in records.CHOICE_TASKS and not (isinstance(label, list) and len(label) == 2):
            raise EvalError(f"{where}: the answer of {task} must be [text, letter], got {json.dumps(label)[:60]}")
        try:
            scores.append(scoring.score_one(task, prediction, label, rule=rule, model=row.get("model")))
        except EvalError:
            raise
        except UNSCORABLE as error:
            raise EvalError(f"{where}: the answer {json.dumps(label)[:60]} cannot be scored ({error})") from error
    return {"task": task, "metric": f"{rule} rule", "score": mean_percent(scores), "samples": len(scores)}

"""A run's folder: config.json, an append-only log that survives a kill, metrics.json.

Every row is written, flushed and synced before the next one is computed. A line torn by a kill is cut off on
reopening and computed again, so no sample is lost and none is counted twice.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apb_jax.files import check_output_folder, read_json, write_json
from apb_jax.json_text import parse_json
from evals.base import EvalError

ROWS = "predictions.jsonl"

# Facts that may differ between the first part of a run and its continuation.
_MAY_DIFFER = ("started", "environment")


class RunFolder:
    """Open (or resume) the run in ``path``; use as a context manager.

    Attributes:
      done: keys of the rows already there, in order.

    Raises:
      EvalError: the folder holds a run with another configuration, or another process writes there.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], key: tuple[str, ...] = ("task", "length", "id")):
        self.path = check_output_folder(path, "--out")
        self._key_fields = key
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = (self.path / ROWS).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise EvalError(f"{self.path}: another process writes to this run; choose another --out") from error
        try:
            self._settle_config(json.loads(json.dumps(config)))
            self._cut_torn_line()
            self.done = {self.key(row): row for row in self.rows()}
        except BaseException:
            self._file.close()
            raise
        self._fresh = not self.done

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self._file.close()
        if kind is not None and self._fresh and not self.done:  # refused: the corrected command may use the folder
            for name in ("config.json", "metrics.json", ROWS):
                (self.path / name).unlink(missing_ok=True)
            for folder in self._made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def key(self, row: Mapping[str, Any]) -> tuple:
        try:
            found = tuple(row[name] for name in self._key_fields)
            hash(found)
        except (KeyError, TypeError) as error:
            raise EvalError(
                f"{self.path / ROWS}: a row without {', '.join(self._key_fields)}; it was edited"
            ) from error
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row to the disk; when this returns the row survives a kill."""
        line = json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[self.key(row)] = json.loads(line)

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from read_rows(self.path)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        write_json(self.path / "metrics.json", metrics)

    def _settle_config(self, config: dict[str, Any]) -> None:
        path = self.path / "config.json"
        if not path.exists():
            write_json(path, config)
            return
        old = read_json(path, "run")
        if not isinstance(old, dict):
            raise EvalError(f"{path} is not the configuration of a run; choose another --out")
        for name in sorted({*old, *config} - {*_MAY_DIFFER}):
            if old.get(name) != config.get(name):
                raise EvalError(
                    f"{self.path} holds another run: {name} was {_short(old.get(name))}, now "
                    f"{_short(config.get(name))}; choose another --out, or repeat the first command to resume it"
                )

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        good = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            good += len(line)
        self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _row(line: bytes) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}")
    return row


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The complete rows of a run's log; a torn last line is left out."""
    path = folder / ROWS
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield _row(line)
            except ValueError as error:
                raise EvalError(f"{path}, line {number}: not a JSON object ({error}); the log was edited") from error

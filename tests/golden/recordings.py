"""Folders of recordings: which cases there are, and a comparison with what a case holds, counted.

Our own lie in ``tests/recorded``, so that a clone alone fails where it should; those of the reference implementations
in ``APB_GOLDEN`` (default ../shared/golden). A case may hold any subset of the arrays its README names.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN, ROOT

OWN = ROOT / "tests" / "recorded"
TOLERANCE = 1e-3
"""Absolute, float32; the recordings' README."""


def cases(*methods: str, folders: tuple[Path, ...] = (OWN, GOLDEN)) -> list[Any]:
    """Folders of the recorded cases of these methods, as parameters of a test."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*/case.json")):
            if json.loads(path.read_text(encoding="utf-8")).get("method") in methods:
                found.append(pytest.param(path.parent, id=path.parent.name))
    return found


class Recorded:
    """The arrays of one file, those that are there; empty where the file is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: dict[str, np.ndarray] = dict(np.load(path)) if path.exists() else {}
        self.compared: collections.Counter[str] = collections.Counter()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def equal(self, name: str, actual: Any, where: str = "", pick: Any = ...) -> None:
        """Ids: the same, where the file has ``name``; ``pick`` indexes what was recorded."""
        if name in self.arrays:
            np.testing.assert_array_equal(np.asarray(actual), self.arrays[name][pick], f"{name} {where} of {self.path}")
            self.compared[name] += 1

    def close(self, name: str, actual: Any, where: str = "", pick: Any = ...) -> None:
        """Numbers: near, where the file has ``name``."""
        if name in self.arrays:
            message = f"{name} {where} of {self.path}"
            np.testing.assert_allclose(
                np.asarray(actual), self.arrays[name][pick], rtol=0, atol=TOLERANCE, err_msg=message
            )
            self.compared[name] += 1


def count(*files: Recorded, unread: tuple[str, ...] = ()) -> int:
    """Comparisons made; fails where a file holds an array that nothing was compared with, skips where there was none.

    ``unread``: arrays that are another test's affair.
    """
    for file in files:
        left = set(file.arrays) - set(file.compared) - set(unread)
        assert not left, f"{file.path} holds {sorted(left)}, which nothing was compared with"
    total = sum(file.compared.total() for file in files)
    if not total:
        pytest.skip(f"{files[0].path.parent.name} holds no array of this test")
    return total

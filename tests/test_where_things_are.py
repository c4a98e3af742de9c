"""docs/where_things_are.md names files that are there, and names that stand in them."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "where_things_are.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+?) \| `([^`|]+)` \| ([^|]+?) \|$", PAGE, re.MULTILINE)


def test_the_page_is_read_whole() -> None:
    assert len(ROWS) == PAGE.count("\n|") - 2 >= 10  # the table without its head


@pytest.mark.parametrize(("change", "file", "where"), ROWS, ids=[row[0] for row in ROWS])
def test_the_place_is_there(change: str, file: str, where: str) -> None:
    names = [name for name in re.findall(r"`([^`]+)`", where) if name.isidentifier()]
    assert names, f"{change}: the page names nothing in {file}"
    text = (ROOT / file).read_text(encoding="utf-8")
    absent = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert not absent, f"{change}: {file} does not speak of {absent}"

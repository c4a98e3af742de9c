"""Follows docs/add_a_method.md: its code blocks, executed in order, add a working method."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, ids, random_model

import apb_jax
from apb_jax.attention.registry import METHODS


def test_the_page_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    page = types.ModuleType("a_new_method")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_method.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    given = {"apb_jax": apb_jax, "np": np, "model": random_model(), "document": ids(11, 203), "query": ids(12, 5)}
    names: dict[str, Any] = vars(page)
    names |= given
    try:
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"docs/add_a_method.md block {number}", "exec", dont_inherit=True), names)
    finally:
        METHODS.pop("local", None)
    assert names["answer"].tokens == names["exact"].tokens

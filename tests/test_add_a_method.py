"""Follows docs/add_a_method.md: its code blocks, executed in order, add a working method."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import pytest
from helpers import ROOT, ids, random_model

import apb_jax
from apb_jax.attention.registry import METHODS, MethodSpec
from apb_jax.errors import UserError


def test_the_page_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is the new module; the others see it through their own imports alone."""
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    code, row, use = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    page = types.ModuleType("apb_jax.attention.local")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.setitem(METHODS, "local", METHODS["full"])  # taken out again when the test ends
    given: dict[str, Any] = {"model": random_model(), "document": ids(11, 203), "query": ids(12, 5)}
    for number, (block, names) in enumerate(((code, vars(page)), (row, given), (use, given)), 1):
        exec(compile(block, f"docs/add_a_method.md block {number}", "exec", dont_inherit=True), names)
    assert METHODS["local"] is page.Local
    assert given["answer"].tokens == given["exact"].tokens
    with pytest.raises(UserError, match="sink_tokens is 'many'; it must be a whole number"):
        MethodSpec("local", {"sink_tokens": "many"})
    engine = apb_jax.Engine(given["model"], "local", apb_jax.make_mesh(sp=4))
    short = [engine.prompt(given["document"][:n], given["query"]) for n in (203, 3)]
    assert [engine.choose([prompt])[0].name for prompt in short] == ["local", "full"]

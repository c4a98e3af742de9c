"""The packaged words and texts that synthetic documents are made of; their licences lie beside them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

NOVEL = _FOLDER / "texts" / "coxon_fund.txt"
"""Henry James, The Coxon Fund (1915 edition, Project Gutenberg, public domain)."""

FILLER = _FOLDER / "texts" / "filler.txt"
"""Plain sentences, one a line: our own and RULER's noise sentences."""


@cache
def word_list(name: str) -> tuple[str, ...]:
    """``nounlist``, ``adjectivelist`` or ``verblist`` of wonderwords 2.2.0 (MIT), one right-stripped word a line."""
    text = (_FOLDER / "words" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line.rstrip() for line in text.splitlines())

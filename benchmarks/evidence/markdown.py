"""What the page's sections are written with: tables, filled lines, pictures, and figures with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS
from evals.tables import length_name


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def prose(text: str) -> str:
    """Lines of 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def bullet(text: str) -> str:
    return textwrap.fill(
        text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def grid(rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Methods down, lengths across."""
    lengths = sorted({r["length"] for r in rows})
    found = {(r["method"], r["length"]): r for r in rows}
    lines = [
        [m, *(show(found[m, n]) if (m, n) in found else "" for n in lengths)]
        for m in METHODS
        if any((m, n) in found for n in lengths)
    ]
    return table(["method", *map(length_name, lengths)], lines)


def picture(path: Path, out: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(out.parent)})"


def interval(r: Row) -> str:
    return f"{r['score']:.1f} [{r['low']:.0f}, {r['high']:.0f}] n={r['n']}"


def difference(r: Row, over: str = "full", digits: int = 1) -> str:
    return f"{r[f'over_{over}']:+.{digits}f} ± {1.96 * r[f'over_{over}_se']:.{digits}f}"

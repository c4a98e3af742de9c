"""The page's section on RULER: tables, pictures, what each method loses, what trained heads bring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pictures
from benchmarks.evidence.markdown import bullet, difference, grid, interval, picture, prose
from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS
from evals.tables import length_name

LOST = 2.0
"""Percent: a method below it at every length is named and not drawn."""


def ruler_section(rows: Sequence[Row], folder: Path, out: Path) -> str:
    """The section as Markdown, its pictures drawn into ``folder``; empty without a mean."""
    own = [r for r in rows if r["section"] == "ruler" and r["task"] != "over apb"]
    means = [r for r in own if r["task"] == "mean"]
    if not means:
        return ""
    drawn = [r for r in pictures.enough(own) if r["task"] != "mean"]
    lost = [m for m in METHODS if max([LOST, *(r["score"] for r in means if r["method"] == m)]) == LOST]
    shown = [r for r in means if r["method"] not in lost]
    left = ", ".join(m for m in lost if any(r["method"] == m for r in means))

    def note(part: Sequence[Row]) -> str:
        counts = [r["n"] for r in part]
        return f"SmolLM2-135M-Instruct, RULER's 13 tasks, {min(counts)} to {max(counts)} samples a task"

    known = note([r for r in drawn if r["method"] not in lost])
    known += f"; 95% intervals{f'; left out: {left}, below {LOST:.0f}%' if left else ''}"
    apart = pictures.over_full(shown, pictures.sheet("RULER: what each method loses", known, folder / "real_ruler.png"))
    by_task = pictures.tasks(drawn, pictures.sheet("RULER by task, %", note(drawn), folder / "real_ruler_tasks.png"))

    def against(r: Row) -> str:
        return difference(r, digits=2) if "over_full" in r else ""

    return "\n\n".join(
        filter(
            None,
            [
                "## RULER",
                "Mean over the 13 tasks (every task counts the same), the pooled samples' interval and their number:",
                grid(means, interval),
                "Difference to full attention over the same samples, in points of the pooled mean, ± 1.96 standard "
                "errors:",
                grid([r for r in means if r["method"] != "full"], against),
                _other_run(own),
                picture(apart, out, "difference to full attention by method and length"),
                picture(by_task, out, "score by task"),
                _lost(shown),
                _by_task([r for r in own if r["method"] not in lost]),
                _trained(rows),
            ],
        )
    )


def _pooled(rows: Sequence[Row]) -> float:
    return float(sum(r["score"] * r["n"] for r in rows) / sum(r["n"] for r in rows))


def _other_run(own: Sequence[Row]) -> str:
    """Names the methods whose difference is to another run's full attention than the page's."""
    tasks: dict[tuple[str, int], list[Row]] = {}
    for r in own:
        if r["task"] != "mean":
            tasks.setdefault((r["method"], r["length"]), []).append(r)
    names: list[str] = []
    scores: dict[int, tuple[float, float]] = {}
    for r in own:
        here, full = tasks.get((r["method"], r["length"])), tasks.get(("full", r["length"]))
        if "over_full" in r and here and full and r["pairs"] == r["n"] == sum(one["n"] for one in full):
            theirs, ours = _pooled(here) - r["over_full"], _pooled(full)
            if abs(theirs - ours) > 0.05:
                names += [r["method"]] * (r["method"] not in names)
                scores[r["length"]] = theirs, ours
    if not names:
        return ""
    said = ", ".join(f"{a:.1f} and {b:.1f} at {length_name(n)}" for n, (a, b) in sorted(scores.items()))
    return prose(
        f"{' and '.join(names)} ran earlier, beside a full attention of their own on the same samples. Its pooled mean "
        f"and this page's: {said}."
    )


def _lost(shown: Sequence[Row]) -> str:
    """Methods above, beside and below full attention at each length, and where that changes, in words."""
    other = [r for r in shown if r["method"] != "full" and "over_full" in r]
    bullets = []
    for length in sorted({r["length"] for r in other}):
        sides: dict[str, list[str]] = {"above": [], "not told apart": [], "below": []}
        for r in sorted((r for r in other if r["length"] == length), key=lambda r: -r["over_full"]):
            beside = abs(r["over_full"]) <= 1.96 * r["over_full_se"]
            side = "not told apart" if beside else "above" if r["over_full"] > 0 else "below"
            sides[side].append(f"{r['method']} {difference(r)}")
        said = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
        bullets.append(bullet(f"{length_name(length)}: {said}."))
    lines = [
        "### What each method loses",
        "Points against full attention, pooled, in their order; one in twenty such intervals misses by chance:",
        "\n".join(bullets),
    ]
    first, last = min(r["length"] for r in shown), max(r["length"] for r in shown)
    pairs = {m: {r["length"]: r for r in shown if r["method"] == m} for m in METHODS}
    moved = []
    for method in METHODS:
        a, b = (pairs[method].get(n, {}) for n in (first, last))
        if first < last and "over_full" in a and "over_full" in b:
            change, noise = b["over_full"] - a["over_full"], math.hypot(a["over_full_se"], b["over_full_se"])
            if abs(change) > 1.96 * noise:
                moved.append(f"{method} {a['over_full']:+.1f} to {b['over_full']:+.1f}")
    if moved and {first, last} <= set(pairs["full"]):
        lines.append(
            prose(
                f"From {length_name(first)} to {length_name(last)} full attention itself falls from "
                f"{pairs['full'][first]['score']:.1f} to {pairs['full'][last]['score']:.1f}, and differences change "
                f"beyond their errors: {', '.join(moved)}."
            )
        )
    return "\n\n".join(lines) if bullets else ""


def _by_task(own: Sequence[Row]) -> str:
    """Tasks on which a method lies apart from full attention."""
    found = {(r["method"], r["length"], r["task"]): r for r in own}
    cells = []
    for (method, length, task), mean in found.items():
        if task != "mean" or method == "full" or ("full", length, "mean") not in found:
            continue
        changes = sorted(
            (round(r["score"] - found["full", length, name]["score"]), name.replace("niah_", ""))
            for (m, n, name), r in found.items()
            if (m, n) == (method, length) and name != "mean" and _outside(found["full", length, name], r)
        )
        cells.append({**mean, "apart": ", ".join(f"{name} {change:+d}" for change, name in changes) or "none"})
    if not cells:
        return ""
    return "\n\n".join(
        [
            "Tasks whose intervals do not meet full attention's, with the difference (`niah_` left out):",
            grid(cells, lambda r: r["apart"]),
        ]
    )


def _trained(rows: Sequence[Row]) -> str:
    """What the retaining heads bring, and what they were taught."""
    ruler = {(r["method"], r["length"], r["task"]): r for r in rows if r["section"] == "ruler"}
    over = sorted((n, r) for (_, n, task), r in ruler.items() if task == "over apb" and "over_apb" in r)
    if not over:
        return ""
    bullets = [
        bullet(
            "apb_heads against apb, the same samples: "
            + "; ".join(f"{length_name(n)} {difference(r, 'apb')} (n={r['pairs']})" for n, r in over)
            + "."
        )
    ]
    kinds = ("niah_single_2", "niah_single_3")
    for method in ("apb_heads", "locret"):
        lengths = sorted(n for m, n, task in ruler if (m, task) == (method, "mean"))
        if all((m, n, kind) in ruler for m in ("full", method) for n in lengths for kind in kinds):
            said = [
                f"{what} "
                + ", ".join(
                    f"{ruler[method, n, kind]['score']:.0f} ({ruler['full', n, kind]['score']:.0f}) at {length_name(n)}"
                    for n in lengths
                )
                for what, kind in zip(("numbers", "UUIDs"), kinds, strict=True)
            ]
            bullets.append(bullet(f"{method} (full) on needles in essays: {'; '.join(said)}."))
    return "\n\n".join(
        [
            "### What trained heads bring",
            prose(
                "The heads were trained on RULER's needle sentence with 7-digit numbers in a novel, on questions of "
                "HotpotQA and on prose (`benchmarks/evidence/prepare.py`). No text or question is tested on, but that "
                "sentence is; sentences with UUIDs are not among them. Besides, Locret answers from an eighth of "
                "the keys, at positions assigned anew; which of the three does what was not measured."
            ),
            "\n".join(bullets),
        ]
    )


def _outside(a: Row, b: Row) -> bool:
    return bool(a["high"] < b["low"] or b["high"] < a["low"])

"""The page's section on receipts: whether they tell a lost answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pictures
from benchmarks.evidence.markdown import bullet, picture, prose, table
from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS
from evals.tables import length_name

LEAST_LOST = 5
"""Answers without which an AUC of one method is not shown."""
SHOWN = ("kl", "kl_first", "kl_answer", "top1_answer")
"""Figures of a receipt whose AUC are shown."""


def receipts_section(rows: Sequence[Row], folder: Path, out: Path) -> str:
    """The section as Markdown, its picture drawn into ``folder``; empty without receipts."""
    own = [r for r in rows if r["section"] == "receipts"]
    each = [r for r in own if r["length"] != "all" and r["method"] != "all"]
    pooled = {r["method"]: r for r in own if r["length"] == "all"}
    together = {r["length"]: r for r in own if r["method"] == "all" and r["length"] != "all"}
    if not each:
        return ""
    lines = [
        [
            r["method"], length_name(r["length"]), str(r["receipts"]), f"{r['mean']['kl']:.4f}",
            f"{r['mean']['kl_answer']:.4f}", f"{100 * r['mean']['top1_answer']:.1f}%", f"{r['lost']} of {r['n']}",
            *(_area(r, name) if name in r["auc"] and r["lost"] >= LEAST_LOST else "" for name in SHOWN),
        ]
        for r in sorted(each, key=lambda r: (METHODS.index(r["method"]), r["length"]))
    ]  # fmt: skip
    head = ["method", "length", "receipts", "KL", "KL, answer", "top-1, answer", "lost", *(f"AUC {s}" for s in SHOWN)]
    shown = {m: pooled[m] for m in METHODS if m in pooled and 0 < pooled[m]["lost"] < pooled[m]["n"]}
    parts = [
        "## Does a receipt tell a lost answer?",
        prose(
            "A receipt compares a method's logits with full attention's over the rows of the question and of full "
            "attention's answer. An answer is lost where the method scores less than full attention on a sample on "
            "which full attention scores at all. AUC: the chance that a lost answer has the higher KL (the lower "
            "agreement) of two samples, one lost and one kept; 0.5 is chance. ± 1.96 standard errors (Hanley and "
            f"McNeil; of methods together Obuchowski's, as they share samples); from {LEAST_LOST} lost answers on."
        ),
        table(head, lines),
    ]
    told = [bullet(_told(length, r)) for length, r in sorted(together.items()) if r["auc"]]
    if told:
        parts += ["All methods that keep some answers:", "\n".join(told)]
    if len(told) > 1:
        parts.append(_as_before(together, each))
    if shown:
        lengths = " and ".join(length_name(n) for n in sorted({r["length"] for r in each}))
        note = (
            f"SmolLM2-135M-Instruct, RULER at {lengths}; all methods that keep some, 95% Wilson intervals; "
            f"grey: each, all lengths; points of {pictures.LEAST_SAMPLES} answers and more"
        )
        path = pictures.receipts(
            shown, together, pictures.sheet("Lost answers over the receipt", note, folder / "real_receipts.png")
        )
        parts.append(picture(path, out, "answers lost over the receipt's KL and over its top-1 agreement"))
    return "\n\n".join(parts)


def _area(r: Row, name: str) -> str:
    return f"{r['auc'][name][0]:.2f} ± {1.96 * r['auc'][name][1]:.2f}"


def _told(length: int, r: Row) -> str:
    """What the receipts of all methods tell at a length, and in plain words."""
    best = sorted(SHOWN, key=lambda name: -r["auc"][name][0])
    said = f"{length_name(length)}: {r['lost']} of {r['n']} lost; AUC " + ", ".join(
        f"`{name}` {_area(r, name)}" for name in best
    )
    same, others = r["by_top1"][-1], r["by_top1"][:-1]
    if same[0] < 1.0 or not others:
        return f"{said}."
    lost, count = sum(round(share * n) for _, share, n in others), sum(n for *_, n in others)
    return (
        f"{said}. Where all top tokens of the answer agree, {round(same[1] * same[2])} of {same[2]} are lost "
        f"({100 * same[1]:.0f}%); where one or more differ, {lost} of {count} ({100 * lost / count:.0f}%)."
    )


def _as_before(together: dict[int, Row], each: Sequence[Row]) -> str:
    """Whether the longest receipts tell what the shortest do, of all methods and under each."""
    first, last = min(together), max(together)

    def moved(a: Row, b: Row, name: str) -> tuple[bool, str]:
        (x, dx), (y, dy) = a["auc"][name], b["auc"][name]
        half = 1.96 * math.hypot(dx, dy)
        return abs(y - x) > half, f"{y - x:+.2f} ± {half:.2f}"

    a, b = together[first], together[last]
    best = [max(SHOWN, key=lambda name: r["auc"][name][0]) for r in (a, b)]
    ends = f"at {length_name(first)}", f"at {length_name(last)}"
    text = f"`{best[0]}` tells the most {ends[0]}, `{best[1]}` {ends[1]}."
    if best[0] == best[1]:
        beyond, change = moved(a, b, best[0])
        apart = "told apart" if beyond else "not told apart"
        text = f"`{best[0]}` tells the most {ends[0]} and {ends[1]}, its AUC {apart} ({change})."
    more = [f"`{name}` {change}" for name in SHOWN for beyond, change in (moved(a, b, name),) if beyond]
    if more:
        text += f" AUC that change beyond their errors: {', '.join(more)}."
    found = {(r["method"], r["length"]): r for r in each if "kl" in r["auc"] and r["lost"] >= LEAST_LOST}
    pairs = [(m, found.get((m, first)), found.get((m, last))) for m in METHODS]
    alone = [
        f"{m} {a['auc']['kl'][0]:.2f} to {b['auc']['kl'][0]:.2f}"
        for m, a, b in pairs
        if a and b and moved(a, b, "kl")[0]
    ]
    if alone:
        text += f" `kl` under single methods, likewise: {', '.join(alone)}."
    return prose(text)

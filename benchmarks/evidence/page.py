"""docs/real_model.md from the scored figures: tables, pictures, and what is lost, in words that follow the numbers."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence import pictures
from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS, Wanted, units
from evals import plots
from evals.tables import length_name

LOST = 2.0
"""Percent: a method below it at every length is named and not drawn."""


def write_page(figures: Path, out: Path, folder: Path) -> list[Path]:
    """The page and its pictures; sections without data are left out."""
    rows = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    facts, rows = rows[0], rows[1:]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_head(facts)]
    parts += [part for part in (make(rows, folder, out) for make in SECTIONS) if part]
    parts.append(_missing(rows, facts["samples"]))
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out, *sorted(folder.glob("real_*.png"))]


def _head(facts: Row) -> str:
    run = facts["runs"][-1]
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if name != "apb_jax")
    commands = list(dict.fromkeys(" ".join(one["arguments"]) for one in facts["runs"]))
    data = facts["samples"]
    return "\n".join(
        [
            "# Every method on a real model",
            "",
            "SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 query and 3 KV heads, 8,192 positions), GGUF file",
            f"of `{data['model']}`; {run['device']}, bf16; {versions}.",
            "APB, Star and their like run on 8 virtual shards of the one device. `apb` scores keys by the query and",
            "needs no training; `apb_heads` and `locret` score them by [retaining heads](models.md). Samples:",
            f"seed {data['seed']}, variant `{data['variant']}`, under the model's own chat template, for which a",
            "length holds 64 tokens. Sizes that papers state for 128K are scaled with the length",
            "(`benchmarks/evidence/units.py`). Intervals are 95% Wilson intervals; the figures are",
            "`benchmarks/results/real_evidence.jsonl`, made by",
            "",
            "```",
            "python -m benchmarks.real_evidence prepare --data DIR --out samples.xz",
            *(f"python -m benchmarks.real_evidence run {command}" for command in commands),
            "python -m benchmarks.real_evidence score --samples samples.xz --runs ROWS",
            "python -m benchmarks.real_evidence page",
            "```",
            "",
            "One cell again: `run` with `--sections ruler --methods apb --lengths 4096` into an empty folder.",
        ]
    )


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


def _grid(rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Methods down, lengths across."""
    lengths = sorted({r["length"] for r in rows})
    found = {(r["method"], r["length"]): r for r in rows}
    lines = [
        [m, *(show(found[m, n]) if (m, n) in found else "" for n in lengths)]
        for m in METHODS
        if any((m, n) in found for n in lengths)
    ]
    return table(["method", *map(length_name, lengths)], lines)


def _picture(path: Path, out: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(out.parent)})"


def interval(r: Row) -> str:
    return f"{r['score']:.1f} [{r['low']:.0f}, {r['high']:.0f}] n={r['n']}"


def _difference(r: Row, over: str = "full", digits: int = 1) -> str:
    return f"{r[f'over_{over}']:+.{digits}f} ± {1.96 * r[f'over_{over}_se']:.{digits}f}"


def _ruler(rows: Sequence[Row], folder: Path, out: Path) -> str:
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
    grid = pictures.tasks(drawn, pictures.sheet("RULER by task, %", note(drawn), folder / "real_ruler_tasks.png"))

    def against(r: Row) -> str:
        return _difference(r, digits=2) if "over_full" in r else ""

    return "\n\n".join(
        filter(
            None,
            [
                "## RULER",
                "Mean over the 13 tasks (every task counts the same), the pooled samples' interval and their number:",
                _grid(means, interval),
                "Difference to full attention over the same samples, in points of the pooled mean, ± 1.96 standard "
                "errors:",
                _grid([r for r in means if r["method"] != "full"], against),
                _other_run(own),
                _picture(apart, out, "difference to full attention by method and length"),
                _picture(grid, out, "score by task"),
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
            sides[side].append(f"{r['method']} {_difference(r)}")
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
    grid = []
    for (method, length, task), mean in found.items():
        if task != "mean" or method == "full" or ("full", length, "mean") not in found:
            continue
        changes = sorted(
            (round(r["score"] - found["full", length, name]["score"]), name.replace("niah_", ""))
            for (m, n, name), r in found.items()
            if (m, n) == (method, length) and name != "mean" and _outside(found["full", length, name], r)
        )
        grid.append({**mean, "apart": ", ".join(f"{name} {change:+d}" for change, name in changes) or "none"})
    if not grid:
        return ""
    return "\n\n".join(
        [
            "Tasks whose intervals do not meet full attention's, with the difference (`niah_` left out):",
            _grid(grid, lambda r: r["apart"]),
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
            + "; ".join(f"{length_name(n)} {_difference(r, 'apb')} (n={r['pairs']})" for n, r in over)
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


def _questions(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "questions"]
    if not own:
        return ""
    parts = ["## Questions of SQuAD and HotpotQA in long documents", "F1 / exact match in percent, official rules, n:"]
    for task in ("SQuAD", "HotpotQA"):
        parts += [
            f"### {task}",
            _grid([r for r in own if r["task"] == task], lambda r: f"{r['f1']:.1f} / {r['exact']:.1f} n={r['n']}"),
        ]
    return "\n\n".join(parts)


def _perplexity(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "perplexity"]
    if not own:
        return ""
    full = {r["length"]: r for r in own if r["method"] == "full"}
    bare = False

    def over(r: Row) -> float | None:
        """Nats a token above full attention; from the two means where the texts of both are as many."""
        if "nll_over_full" in r:
            return float(r["nll_over_full"])
        theirs = full.get(r["length"])
        return math.log(r["perplexity"] / theirs["perplexity"]) if theirs and theirs["n"] == r["n"] else None

    def show(r: Row) -> str:
        nonlocal bare
        nats = over(r)
        if nats is None or r["method"] == "full":
            return f"{r['perplexity']:.3f} n={r['n']}"
        bare |= "nll_over_full" not in r
        half = f" ± {1.96 * r['nll_over_full_se']:.4f}" if "nll_over_full" in r else ""
        return f"{r['perplexity']:.3f} ({nats:+.4f}{half})"

    grid = _grid(own, show)
    text = (
        "Perplexity of the last 511 tokens of a text whose first part went through each method's prefill (essays); in "
        "brackets the nats a token above full attention on the same texts."
    )
    if bare:
        text += " Without an interval: the difference of the means, where full attention ran apart."
    parts = ["## Perplexity", prose(text), grid]
    changes = [r for r in own if "nll_over_full" in r]
    if len(changes) > 1:
        parts.append(_nats(changes))
    longest = max(r["length"] for r in own)
    ruler = {r["method"]: r for r in rows if r["section"] == "ruler" and r["task"] == "mean" and r["length"] == longest}
    here = sorted(
        (nats, r["method"])
        for r in own
        if r["length"] == longest and r["method"] != "full" and "over_full" in ruler.get(r["method"], {})
        if (nats := over(r)) is not None
    )
    if len(here) > 1:
        order = ", ".join(f"{name} {nats:+.4f} ({ruler[name]['over_full']:+.1f})" for nats, name in here)
        parts.append(prose(f"Nats at {length_name(longest)} in their order, beside RULER's points: {order}."))
    return "\n\n".join(parts)


def _nats(changes: Sequence[Row]) -> str:
    """On which side of full attention the nats lie, and where that changes from the shortest length to the longest."""
    beside = [
        f"{r['method']} at {length_name(r['length'])}"
        for r in changes
        if r["nll_over_full"] <= 1.96 * r["nll_over_full_se"]
    ]
    but = f" but {', '.join(beside)}" if beside else ""
    text = f"Every method lies above full attention at every length beyond its interval{but}."
    first, last = min(r["length"] for r in changes), max(r["length"] for r in changes)
    sides: dict[str, list[str]] = {"grow": [], "shrink": []}
    found = {(r["method"], r["length"]): r for r in changes}
    for method in METHODS if first < last else ():
        a, b = found.get((method, first)), found.get((method, last))
        if a and b:
            change = b["nll_over_full"] - a["nll_over_full"]
            if abs(change) > 1.96 * math.hypot(a["nll_over_full_se"], b["nll_over_full_se"]):
                both = f"{method} {a['nll_over_full']:.4f} to {b['nll_over_full']:.4f}"
                sides["grow" if change > 0 else "shrink"].append(both)
    moved = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    if moved:
        text += f" From {length_name(first)} to {length_name(last)}, beyond their errors, {moved}."
    return prose(text)


def _needles(rows: Sequence[Row], folder: Path, out: Path) -> str:
    cells = pictures.heat(rows, "needle")
    if not cells:
        return ""
    own = [r for r in rows if r["section"] == "needle"]
    counts = [r["n"] for r in own if r["depth"] != "mean"]
    note = f"SmolLM2-135M-Instruct, essays,\n{min(counts)} to {max(counts)} needles a cell"
    path = plots.needle_heatmap(cells, pictures.sheet("Needles by depth", note, folder / "real_needle.png"))
    means = [r for r in own if r["depth"] == "mean"]
    return "\n\n".join(["## Needles", _grid(means, interval), _picture(path, out, "needle heat map")])


def _receipts(rows: Sequence[Row], folder: Path, out: Path) -> str:
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
        parts.append(_picture(path, out, "answers lost over the receipt's KL and over its top-1 agreement"))
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


LEAST_LOST = 5
"""Answers without which an AUC of one method is not shown."""


SHOWN = ("kl", "kl_first", "kl_answer", "top1_answer")


def _sweep(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "sweep"]
    if not own:
        return ""
    found = {(r["anchor"], r["passing"]): r for r in own}
    anchors, passings = sorted({a for a, _ in found}), sorted({p for _, p in found})
    lines = [[str(a), *(interval(found[a, p]) if (a, p) in found else "" for p in passings)] for a in anchors]
    best = max(own, key=lambda r: r["score"])
    beside = ""
    if "over_full" in best:
        half = 1.96 * best["over_full_se"]
        beside = f", {best['over_full']:+.1f} ± {half:.1f} points against full attention on the same samples"
    parts = [
        "## Which budget buys it back",
        "apb at 8K, keys scored by the query: anchor tokens down, passing tokens across.",
        table(["anchor", *map(str, passings)], lines),
        prose(f"Best: an anchor of {best['anchor']} with {best['passing']} passing tokens, {interval(best)}{beside}."),
    ]
    paired = [r for r in own if "over_full" in r]
    if paired:
        note = f"SmolLM2-135M-Instruct, RULER at 8K, {best['n']} samples a point; 95% intervals, same samples"
        path = pictures.sweep(paired, pictures.sheet("Which budget buys it back", note, folder / "real_sweep.png"))
        parts.append(_picture(path, out, "difference to full attention over anchor and passing"))
    return "\n\n".join(parts)


def _beyond(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] in ("beyond", "string")]
    if not own:
        return ""
    trained = [r for r in rows if r["section"] in ("perplexity", "needle") and r["method"] in ("full", "apb")]
    parts = ["## Beyond the trained length, and STRING within it"]
    for section, title in (("beyond", "Beyond it"), ("string", "STRING within it")):
        part = [r for r in own if r["section"] == section]
        if section == "string" and part:
            part += [dict(r, rope="") for r in trained]
        keys = sorted({(r["length"], r["method"], r["rope"]) for r in part})
        lines = []
        for length, method, rope in keys:
            mine = [r for r in part if (r["length"], r["method"], r["rope"]) == (length, method, rope)]
            needle = next((r for r in mine if r["measure"] == "needle" and r["depth"] == "mean"), None)
            text = next((r for r in mine if r["measure"] == "perplexity"), None)
            lines.append(
                [
                    length_name(length), method, rope or "as trained", interval(needle) if needle else "",
                    f"{text['perplexity']:.2f} n={text['n']}" if text else "",
                ]
            )  # fmt: skip
        if lines:
            parts += [f"### {title}", table(["length", "method", "rope", "needles", "perplexity"], lines)]
    picture = [r for r in own if r["section"] == "beyond"] + [r for r in trained if r["length"] == 8192]
    note = "SmolLM2-135M-Instruct; 8K: as trained"
    path = pictures.beyond(picture, pictures.sheet("Beyond 8,192 positions", note, folder / "real_beyond.png"))
    parts.append(_picture(path, out, "needles and perplexity beyond the trained length"))
    return "\n\n".join(parts)


SECTIONS = (_ruler, _questions, _perplexity, _needles, _receipts, _sweep, _beyond)


def _lengths(lengths: Sequence[int]) -> str:
    *front, last = map(length_name, lengths)
    return f"{', '.join(front)} and {last}" if front else last


def _missing(rows: Sequence[Row], samples: Row) -> str:
    """Cells that the sections have and the figures lack, and those that hold fewer samples than were planned."""
    have = {
        (r["section"], r["method"], r["length"], r.get("rope", ""), r.get("measure", "")): _count(r)
        for r in rows
        if r["section"] in MISSING and r.get("depth", "mean") == "mean" and r.get("task", "mean") == "mean"
    }
    planned = max((n for (section, *_), n in have.items() if section == "receipts"), default=0)
    bullets, short = [], []
    for section, title in MISSING.items():
        cells: dict[int, dict[str, list[bool]]] = {}
        for unit in units([Wanted.parse(section, METHODS, ())], 0):
            measure = {"text": "perplexity", "needle": "needle"}.get(unit.kind, "")
            n = have.get((section, unit.label, unit.length, unit.rope, measure))
            cells.setdefault(unit.length, {}).setdefault(unit.label, []).append(n is not None)
            made = samples.get("counts", {}).get(f"{unit.kind} {unit.length}", 0)
            made = planned if section == "receipts" else made
            if n is not None and n < made and unit.kind != "text":
                rope = f" {unit.rope}" if unit.rope else ""
                short.append(f"{title} {length_name(unit.length)}, {unit.label}{rope} ({n} of {made})")
        bare = sorted(n for n, found in cells.items() if not any(map(any, found.values())))
        same: dict[tuple[int, ...], list[str]] = {}
        for method in METHODS:
            lengths = tuple(
                sorted(n for n, found in cells.items() if n not in bare and not all(found.get(method, [1])))
            )
            if lengths:
                same.setdefault(lengths, []).append(method)
        said = [f"everything at {_lengths(bare)}"] if bare else []
        said += [f"{', '.join(names)} at {_lengths(n)}" for n, names in same.items()]
        if said:
            bullets.append(bullet(f"{title}: {'; '.join(said)}."))
    if short:
        bullets.append(bullet(f"Fewer samples than planned: {'; '.join(short)}."))
    return "\n\n".join(["## Not measured", "\n".join(bullets) or "Nothing is left."])


def _count(r: Row) -> int:
    """Samples of a cell; receipts count also those on which full attention scores nothing."""
    return 0 if r["section"] == "receipts" and r["method"] == "all" else int(r["receipts" if "receipts" in r else "n"])


MISSING = {
    "ruler": "RULER", "perplexity": "Perplexity", "needle": "Needles", "receipts": "Receipts",
    "beyond": "Beyond the trained length", "string": "STRING within the trained length",
}  # fmt: skip

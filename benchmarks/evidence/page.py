"""docs/real_model.md from the scored figures: tables, pictures, and what is lost, in words that follow the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import pictures
from benchmarks.evidence.markdown import bullet, grid, interval, picture, prose, table
from benchmarks.evidence.page_receipts import receipts_section
from benchmarks.evidence.page_ruler import ruler_section
from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS, Wanted, units
from evals import plots
from evals.tables import length_name


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


def _questions(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "questions"]
    if not own:
        return ""
    parts = ["## Questions of SQuAD and HotpotQA in long documents", "F1 / exact match in percent, official rules, n:"]
    for task in ("SQuAD", "HotpotQA"):
        parts += [
            f"### {task}",
            grid([r for r in own if r["task"] == task], lambda r: f"{r['f1']:.1f} / {r['exact']:.1f} n={r['n']}"),
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

    cells = grid(own, show)
    text = (
        "Perplexity of the last 511 tokens of a text whose first part went through each method's prefill (essays); in "
        "brackets the nats a token above full attention on the same texts."
    )
    if bare:
        text += " Without an interval: the difference of the means, where full attention ran apart."
    parts = ["## Perplexity", prose(text), cells]
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
    return "\n\n".join(["## Needles", grid(means, interval), picture(path, out, "needle heat map")])


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
        parts.append(picture(path, out, "difference to full attention over anchor and passing"))
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
    drawn = [r for r in own if r["section"] == "beyond"] + [r for r in trained if r["length"] == 8192]
    note = "SmolLM2-135M-Instruct; 8K: as trained"
    path = pictures.beyond(drawn, pictures.sheet("Beyond 8,192 positions", note, folder / "real_beyond.png"))
    parts.append(picture(path, out, "needles and perplexity beyond the trained length"))
    return "\n\n".join(parts)


SECTIONS = (ruler_section, _questions, _perplexity, _needles, receipts_section, _sweep, _beyond)


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

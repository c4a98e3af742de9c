"""docs/real_model.md from the scored figures: tables, pictures, and what is lost, in words that follow the numbers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence import pictures
from benchmarks.evidence.pictures import Row
from benchmarks.evidence.units import METHODS
from evals import plots
from evals.tables import length_name

WORDS = {
    "apb": "apb, keys scored by the query (training-free)",
    "apb_heads": "apb, keys scored by retaining heads",
}


def write_page(figures: Path, out: Path, folder: Path) -> list[Path]:
    """The page and its pictures; sections without data are left out."""
    rows = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    facts, rows = rows[0], rows[1:]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_head(facts)]
    parts += [part for part in (make(rows, folder, out) for make in SECTIONS) if part]
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
            "APB, Star and their like run on 8 virtual shards of the one device. Samples:",
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


def _grid(rows: Sequence[Row], show: Callable[[Row], str]) -> str:
    """Methods down, lengths across."""
    lengths = sorted({r["length"] for r in rows})
    found = {(r["method"], r["length"]): r for r in rows}
    lines = [
        [WORDS.get(m, m), *(show(found[m, n]) if (m, n) in found else "" for n in lengths)]
        for m in METHODS
        if any((m, n) in found for n in lengths)
    ]
    return table(["method", *map(length_name, lengths)], lines)


def _picture(path: Path, out: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(out.parent)})"


def interval(r: Row) -> str:
    return f"{r['score']:.1f} [{r['low']:.0f}, {r['high']:.0f}] n={r['n']}"


def _ruler(rows: Sequence[Row], folder: Path, out: Path) -> str:
    every = [r for r in rows if r["section"] == "ruler"]
    trained = [r for r in every if r["task"] == "over apb" and "over_apb" in r]
    own = [r for r in every if r["task"] != "over apb"]
    means = [r for r in own if r["task"] == "mean"]
    if not means:
        return ""
    drawn = pictures.enough(own)
    metrics = pictures.ruler_metrics(drawn)
    counts = sorted({r["n"] for r in drawn if r["task"] != "mean"})
    note = (
        f"SmolLM2-135M-Instruct, 13 tasks, {counts[0]} to {counts[-1]} samples a cell, bands: 95% interval of the mean"
    )
    line = plots.score_over_length(metrics, pictures.sheet("RULER over length", note, folder / "real_ruler.png"))
    grid = plots.task_grid(metrics, pictures.sheet("RULER by task", note, folder / "real_ruler_tasks.png"))

    def against(r: Row) -> str:
        if r["method"] == "full" or "over_full" not in r:
            return ""
        return f"{r['over_full']:+.2f} ± {1.96 * r['over_full_se']:.2f}"

    return "\n\n".join(
        [
            "## RULER",
            "Mean over the 13 tasks (every task counts the same), the pooled samples' interval and their number:",
            _grid(means, interval),
            "Difference to full attention over the same samples, in points of the pooled mean, ± 1.96 standard errors:",
            _grid([r for r in means if r["method"] != "full"], against),
            _picture(line, out, "mean score over length"),
            _picture(grid, out, "score by task"),
            _lost(own),
            "\n".join(
                f"- Trained heads against the training-free scorer, {length_name(r['length'])}, the same {r['pairs']} "
                f"samples: {r['over_apb']:+.2f} ± {1.96 * r['over_apb_se']:.2f} points."
                for r in trained
            ),
        ]
    )


def _lost(own: Sequence[Row]) -> str:
    """What APB loses, in words."""
    found = {(r["method"], r["length"], r["task"]): r for r in own}
    lines = ["### What APB loses, and where"]
    for method in ("apb", "apb_heads"):
        for length in sorted({r["length"] for r in own if r["method"] == method}):
            full, mine = found.get(("full", length, "mean")), found.get((method, length, "mean"))
            if full is None or mine is None:
                continue
            changes = sorted(
                (found[method, length, r["task"]]["score"] - r["score"], r["task"])
                for r in own
                if r["method"] == "full" and r["length"] == length and (method, length, r["task"]) in found
            )
            apart = [
                f"{task} {change:+.0f}"
                for change, task in changes
                if task != "mean" and _outside(found["full", length, task], found[method, length, task])
            ]
            kept = 100 * mine["score"] / full["score"] if full["score"] else 0.0
            text = (
                f"{WORDS[method]}, {length_name(length)}: {mine['score']:.1f} of full attention's "
                f"{full['score']:.1f} ({kept:.0f}%). Tasks whose intervals do not meet: {', '.join(apart) or 'none'}."
            )
            lines += textwrap.wrap(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) if len(lines) > 1 else ""


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

    def show(r: Row) -> str:
        if "nll_over_full" not in r:
            return f"{r['perplexity']:.3f} n={r['n']}"
        return f"{r['perplexity']:.3f} ({r['nll_over_full']:+.4f} ± {1.96 * r['nll_over_full_se']:.4f} nats)"

    text = (
        "Perplexity of the last 511 tokens of a text whose first part went through each method's prefill (essays; in\n"
        "brackets the difference to full attention per token, over the same texts):"
    )
    return "\n\n".join(["## Perplexity", text, _grid(own, show)])


def _needles(rows: Sequence[Row], folder: Path, out: Path) -> str:
    cells = pictures.heat(rows, "needle")
    if not cells:
        return ""
    note = "SmolLM2-135M-Instruct, nine needles a cell in essays"
    path = plots.needle_heatmap(cells, pictures.sheet("Needles by depth and length", note, folder / "real_needle.png"))
    means = [r for r in rows if r["section"] == "needle" and r["depth"] == "mean"]
    return "\n\n".join(["## Needles", _grid(means, interval), _picture(path, out, "needle heat map")])


def _receipts(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "receipts"]
    each = [r for r in own if r["length"] != "all"]
    pooled = {r["method"]: r for r in own if r["length"] == "all"}
    if not each:
        return ""
    lines = [
        [
            WORDS.get(r["method"], r["method"]), length_name(r["length"]), str(r["receipts"]), f"{r['mean']['kl']:.4f}",
            f"{r['mean']['kl_answer']:.4f}", f"{100 * r['mean']['top1_answer']:.1f}%", f"{r['lost']} of {r['n']}",
            *(f"{r['auc'][s][0]:.2f} ± {1.96 * r['auc'][s][1]:.2f}" if s in r["auc"] else "" for s in SHOWN),
        ]
        for r in sorted(each, key=lambda r: (METHODS.index(r["method"]), r["length"]))
    ]  # fmt: skip
    head = ["method", "length", "receipts", "KL", "KL, answer", "top-1, answer", "lost", *(f"AUC {s}" for s in SHOWN)]
    shown = {m: pooled[m] for m in METHODS if m in pooled and 0 < pooled[m]["lost"] < pooled[m]["n"]}
    parts = [
        "## Does a receipt tell a lost answer?",
        "A receipt compares a method's logits with full attention's over the rows of the question and of full\n"
        "attention's answer. An answer is lost where the method scores less than full attention on a sample on which\n"
        "full attention scores at all. AUC: the chance that a lost answer has the higher KL (the lower agreement) of\n"
        "two samples, one lost and one kept; 0.5 is chance. ± 1.96 standard errors (Hanley and McNeil).",
        table(head, lines),
    ]
    both = pooled.get("all")
    if both and both["auc"]:
        best = max(both["auc"], key=lambda name: both["auc"][name][0])
        parts.append(
            prose(
                f"All methods that keep some ({both['lost']} of {both['n']} lost): the best signal is `{best}`, AUC "
                f"{both['auc'][best][0]:.2f} ± {1.96 * both['auc'][best][1]:.2f}, rank correlation "
                f"{both['correlation'][best]:.2f}; `kl` over question and answer has {both['auc']['kl'][0]:.2f}."
            )
        )
        same, others = both["by_top1"][-1], both["by_top1"][:-1]
        if same[0] == 1.0 and others:
            lost, count = sum(round(share * n) for _, share, n in others), sum(n for *_, n in others)
            parts.append(
                prose(
                    f"In plain words: where all top tokens of the answer agree, {round(same[1] * same[2])} of "
                    f"{same[2]} answers are lost ({100 * same[1]:.0f}%); where one or more differ, {lost} of {count} "
                    f"({100 * lost / count:.0f}%)."
                )
            )
    if shown:
        lengths = " and ".join(length_name(n) for n in sorted({r["length"] for r in each}))
        note = f"SmolLM2-135M-Instruct, RULER at {lengths}; a method that loses every answer is left out"
        path = pictures.receipts(
            shown, pictures.sheet("Lost answers over the receipt", note, folder / "real_receipts.png")
        )
        parts.append(_picture(path, out, "answers lost over the receipt's KL and over its top-1 agreement"))
    return "\n\n".join(parts)


SHOWN = ("kl", "kl_first", "kl_answer", "top1_answer")


def _sweep(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] == "sweep"]
    if not own:
        return ""
    found = {(r["anchor"], r["passing"]): r for r in own}
    anchors, passings = sorted({a for a, _ in found}), sorted({p for _, p in found})
    lines = [[str(a), *(interval(found[a, p]) if (a, p) in found else "" for p in passings)] for a in anchors]
    asked = ("ruler", "full", 8192, "mean")
    place = ("section", "method", "length", "task")
    full = next((r for r in rows if tuple(r.get(name) for name in place) == asked), None)
    note = f"SmolLM2-135M-Instruct, RULER at 8K, 13 tasks, {own[0]['n']} samples a point, 8 shards; bands: Wilson"
    path = pictures.sweep(own, full, pictures.sheet("Which budget buys it back", note, folder / "real_sweep.png"))
    best = max(own, key=lambda r: r["score"])
    beside = ""
    if "over_full" in best:
        half = 1.96 * best["over_full_se"]
        beside = f", {best['over_full']:+.1f} ± {half:.1f} points against full attention on the same samples"
    return "\n\n".join(
        [
            "## Which budget buys it back",
            "apb at 8K, keys scored by the query: anchor tokens down, passing tokens across.",
            table(["anchor", *map(str, passings)], lines),
            prose(
                f"Best: an anchor of {best['anchor']} with {best['passing']} passing tokens, {interval(best)}{beside}."
            ),
            _picture(path, out, "score over anchor and passing"),
        ]
    )  # fmt: skip


def _beyond(rows: Sequence[Row], folder: Path, out: Path) -> str:
    own = [r for r in rows if r["section"] in ("beyond", "string")]
    if not own:
        return ""
    trained = [r for r in rows if r["section"] in ("perplexity", "needle") and r["method"] in ("full", "apb")]
    parts = ["## Beyond the trained length, and STRING within it"]
    for section, title in (("beyond", "16K and 32K"), ("string", "STRING at 4K to 8K")):
        part = [r for r in own if r["section"] == section] + (
            [dict(r, rope="") for r in trained] if section == "string" else []
        )
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

"""Pictures of the page on a real model; one colour and marker a method, as in the evals' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.units import METHODS
from evals import plots

Row = dict[str, Any]
STYLES = {method: number for number, method in enumerate(METHODS)}
LEAST_SAMPLES = 5
"""Of a point of the receipts' picture."""


def enough(rows: Sequence[Row]) -> list[Row]:
    """RULER's rows without the lengths of a method whose cells hold less than half of the most samples of a cell."""
    most = max((r["n"] for r in rows if r["task"] != "mean"), default=0)
    known = {(r["method"], r["length"]) for r in rows if r["task"] != "mean" and 2 * r["n"] >= most}
    return [r for r in rows if (r["method"], r["length"]) in known]


def sheet(title: str, note: str, path: Path) -> plots.Sheet:
    return plots.Sheet(title, note, path, STYLES)


def ruler_metrics(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What ``evals.plots`` takes, of all methods in their order."""
    out: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        own = [r for r in rows if r["section"] == "ruler" and r["method"] == method]
        if own:
            out[method] = {
                "results": [
                    {"task": r["task"], "length": r["length"], "score": r["score"], "samples": r["n"]}
                    for r in own
                    if r["task"] not in ("mean", "over apb")
                ],
                "mean_by_length": {str(r["length"]): {"score": r["score"]} for r in own if r["task"] == "mean"},
            }
    return out


def heat(rows: Sequence[Row], section: str) -> dict[str, dict[tuple[int, int], float]]:
    """method, and rope where there is one -> {(length, depth): percent}."""
    out: dict[str, dict[tuple[int, int], float]] = {}
    for r in rows:
        if r["section"] == section and r.get("measure") == "needle" and r["depth"] != "mean":
            name = " ".join(filter(None, (r["method"], r["rope"])))
            out.setdefault(name, {})[r["length"], r["depth"]] = r["score"]
    order = {method: number for number, method in enumerate(METHODS)}
    return dict(sorted(out.items(), key=lambda item: (order[item[0].split()[0]], item[0])))


def sweep(rows: Sequence[Row], full: Row | None, target: plots.Sheet) -> Path:
    """Score over passing tokens, a line an anchor; full attention across."""
    plt = plots._pyplot()
    figure, axis = plt.subplots(figsize=(9, 5))
    if full is not None:
        axis.axhline(full["score"], color="#30343b", linestyle=":", linewidth=2)
        axis.annotate(f"full {full['score']:.1f}", (0, full["score"]), xytext=(0, 5), textcoords="offset points")
    ends = []
    for number, anchor in enumerate(sorted({r["anchor"] for r in rows})):
        own = sorted((r["passing"], r["score"], r["low"], r["high"]) for r in rows if r["anchor"] == anchor)
        x, y, low, high = np.array(own).T
        colour = plots.COLOURS[number]
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        ends.append(plots._line(axis, number, x, y, f"anchor {anchor}"))
    axis.set_xlabel("passing tokens of each shard and KV head")
    axis.set_ylabel("mean score (%)")
    axis.set_xticks(sorted({r["passing"] for r in rows}))
    plots._end_labels(axis, ends)
    axis.set_title(target.title)
    return plots._save(plt, figure, target)


def receipts(pooled: Mapping[str, Row], target: plots.Sheet) -> Path:
    """Share of answers lost over the receipt's KL and over its top-1 agreement, a line a method."""
    plt = plots._pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(17, 5), layout="constrained")
    for axis, column in zip(axes, ("bins", "by_top1"), strict=True):
        ends = []
        least = min(LEAST_SAMPLES, max(n for row in pooled.values() for *_, n in row[column]))
        for method, row in pooled.items():
            x, y = np.array([[signal, lost] for signal, lost, n in row[column] if n >= least]).T
            x, y = (np.maximum(x, 1e-6), y) if column == "bins" else (100 * (1 - x[::-1]), y[::-1])
            ends.append(plots._line(axis, STYLES[method], x, 100 * y, method))
        axis.set_ylim(0, 104)
        axis.set_ylabel("answers lost (%)")
        plots._end_labels(axis, ends)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("KL(full || method) over question and answer, nats (bins of equally many samples)")
    axes[1].set_xlabel("rows of the answer whose top token differs (%)")
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)


def beyond(rows: Sequence[Row], target: plots.Sheet) -> Path:
    """Needles found over length, beside perplexity, a line a method and rope family."""
    plt = plots._pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    names = list(dict.fromkeys((r["method"], rope_family(r["rope"])) for r in rows))
    for axis, measure, column in zip(axes, ("needle", "perplexity"), ("score", "perplexity"), strict=True):
        ends, lengths = [], set()
        for number, (method, rope) in enumerate(names):
            points = sorted(
                (r["length"], r[column])
                for r in rows
                if (r["method"], rope_family(r["rope"]), r["measure"]) == (method, rope, measure)
                and r.get("depth", "mean") == "mean"
            )
            if points:
                x, y = np.array(points).T
                lengths |= set(x.astype(int))
                ends.append(plots._line(axis, number, x, y, f"{method}, {rope}"))
        if measure == "perplexity":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 104)
        axis.set_ylabel("needles found (%)" if measure == "needle" else "perplexity")
        if lengths:
            plots._length_axis(axis, sorted(lengths))
        plots._end_labels(axis, ends, log=measure == "perplexity")
        axis.set_title("needles" if measure == "needle" else "perplexity")
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)


def rope_family(rope: str) -> str:
    """``yarn``, ``string``, ``yarn+string``, or ``as trained``."""
    return "+".join(part.partition(":")[0] for part in rope.split("+")) if rope else "as trained"

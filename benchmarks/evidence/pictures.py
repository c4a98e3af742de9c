"""Pictures of the page on a real model; one colour and marker a method, as in the evals' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apb_jax.synthetic.grading import wilson
from benchmarks.evidence.units import METHODS
from evals import plots
from evals.tables import length_name

Row = dict[str, Any]
STYLES = {method: number for number, method in enumerate(METHODS)}
INK = "#30343b"
LEAST_SAMPLES = 5
"""Of a point of the receipts' picture."""


def enough(rows: Sequence[Row]) -> list[Row]:
    """RULER's rows without the lengths of a method whose cells hold less than half of the most samples of a cell."""
    most = max((r["n"] for r in rows if r["task"] != "mean"), default=0)
    known = {(r["method"], r["length"]) for r in rows if r["task"] != "mean" and 2 * r["n"] >= most}
    return [r for r in rows if (r["method"], r["length"]) in known]


def sheet(title: str, note: str, path: Path) -> plots.Sheet:
    return plots.Sheet(title, note, path, STYLES)


def over_full(means: Sequence[Row], target: plots.Sheet) -> Path:
    """Each method's difference to full attention with its interval, a panel a length."""
    plt = plots._pyplot()
    lengths = sorted({r["length"] for r in means})
    names = [m for m in METHODS if m != "full" and any(r["method"] == m for r in means)]
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(1.5 + 4.5 * len(lengths), 1.5 + 0.4 * len(names)), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
    for axis, length in zip(axes[0], lengths, strict=True):
        here = {r["method"]: r for r in means if r["length"] == length}
        for place, name in enumerate(names):
            if "over_full" in here.get(name, {}):
                middle, half = here[name]["over_full"], 1.96 * here[name]["over_full_se"]
                _dot(axis, STYLES[name], place, middle, middle - half, middle + half, f"{middle:+.1f}")
        axis.axvline(0, color=INK, linestyle=":", linewidth=2)
        full = f", full {here['full']['score']:.1f}%" if "full" in here else ""
        axis.set_title(f"{length_name(length)}{full}", fontsize=13)
    axes[0, 0].set_xmargin(0.12)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("points against full attention on the same samples", fontsize=12)
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)


def _dot(axis: Any, number: int, place: float, x: float, low: float, high: float, text: str) -> None:
    """A point with its interval across, and its value above."""
    from matplotlib.patheffects import withStroke

    again, style = divmod(number, len(plots.COLOURS))
    colour = plots.COLOURS[style]
    axis.plot([low, high], [place, place], color=colour, linewidth=2.4, solid_capstyle="round")
    axis.plot(
        [x], [place], color=colour, marker=plots.MARKERS[style % len(plots.MARKERS)], markersize=8,
        markerfacecolor="white" if again else colour,
    )  # fmt: skip
    axis.annotate(
        text, (x, place), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9, color=INK,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def tasks(rows: Sequence[Row], target: plots.Sheet) -> Path:
    """Methods down, tasks across, the score in every cell; a panel a length."""
    plt = plots._pyplot()
    lengths = sorted({r["length"] for r in rows})
    across = sorted({r["task"] for r in rows})
    down = [m for m in METHODS if any(r["method"] == m for r in rows)]
    height = 1.1 + 0.34 * len(down)
    figure, axes = plt.subplots(
        len(lengths), 1, figsize=(2 + 0.8 * len(across), 1 + height * len(lengths)), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for axis, length in zip(axes[:, 0], lengths, strict=True):
        values = np.full((len(down), len(across)), np.nan)
        for r in rows:
            if r["length"] == length:
                values[down.index(r["method"]), across.index(r["task"])] = r["score"]
        plots._cells(axis, values, lambda v: f"{v:.0f}")
        axis.set_yticks(range(len(down)), down)
        axis.set_xticks(range(len(across)), [name.replace("niah_", "niah\n") for name in across], fontsize=10)
        axis.set_title(length_name(length), fontsize=13, pad=6)
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)


def heat(rows: Sequence[Row], section: str) -> dict[str, dict[tuple[int, int], float]]:
    """method, and rope where there is one -> {(length, depth): percent}."""
    out: dict[str, dict[tuple[int, int], float]] = {}
    for r in rows:
        if r["section"] == section and r.get("measure") == "needle" and r["depth"] != "mean":
            name = " ".join(filter(None, (r["method"], r["rope"])))
            out.setdefault(name, {})[r["length"], r["depth"]] = r["score"]
    order = {method: number for number, method in enumerate(METHODS)}
    return dict(sorted(out.items(), key=lambda item: (order[item[0].split()[0]], item[0])))


def sweep(rows: Sequence[Row], target: plots.Sheet) -> Path:
    """Difference to full attention over passing tokens, a line an anchor, side by side so that intervals are seen."""
    plt = plots._pyplot()
    figure, axis = plt.subplots(figsize=(9, 5))
    axis.axhline(0, color=INK, linestyle=":", linewidth=2)
    anchors, ends = sorted({r["anchor"] for r in rows}), []
    for number, anchor in enumerate(anchors):
        own = sorted((r["passing"], r["over_full"], 1.96 * r["over_full_se"]) for r in rows if r["anchor"] == anchor)
        x, y, half = np.array(own).T
        x = x + 8 * (number - (len(anchors) - 1) / 2)
        axis.vlines(x, y - half, y + half, color=plots.COLOURS[number], alpha=0.6, linewidth=1.6)
        name, _, height, colour = plots._line(axis, number, x, y, f"anchor {anchor}")
        ends.append((name, max(r["passing"] for r in rows) + 12, height, colour))
    axis.set_xlabel("passing tokens of each shard and KV head")
    axis.set_ylabel("points against full attention")
    axis.set_xticks(sorted({r["passing"] for r in rows}))
    plots._end_labels(axis, ends)
    axis.set_title(target.title)
    return plots._save(plt, figure, target)


def receipts(pooled: Mapping[str, Row], together: Mapping[int, Row], target: plots.Sheet) -> Path:
    """Share of answers lost over the receipt's KL and over its top-1 agreement: all methods at each length with 95%
    intervals, each method thin."""
    plt = plots._pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    for axis, column in zip(axes, ("bins", "by_top1"), strict=True):

        def points(row: Row, column: str = column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            least = min(LEAST_SAMPLES, max(n for *_, n in row[column]))
            x, y, n = np.array([one for one in row[column] if one[2] >= least]).T
            return (np.maximum(x, 1e-6), y, n) if column == "bins" else (100 * (1 - x[::-1]), y[::-1], n[::-1])

        for row in pooled.values():
            axis.plot(*points(row)[:2], color="#b4bac3", linewidth=1, zorder=1)
        ends = []
        for number, (length, row) in enumerate(sorted(together.items())):
            x, y, n = points(row)
            low, high = np.array([wilson(share * count, int(count)) for share, count in zip(y, n, strict=True)]).T
            axis.vlines(x, low, high, color=plots.COLOURS[number], linewidth=1.6, zorder=3)
            ends.append(plots._line(axis, number, x, y, length_name(length)))
        axis.set_ylim(0, 1.04)
        axis.set_yticks(np.linspace(0, 1, 6), [f"{share:.0f}" for share in np.linspace(0, 100, 6)])
        axis.set_ylabel("answers lost (%)")
        if column == "bins":
            axis.set_xscale("log")
        plots._end_labels(axis, ends)
    axes[0].set_xlabel("KL(full || method) over question and answer, nats (bins of equally many samples)")
    axes[1].set_xlabel("rows of the answer whose top token differs (%)")
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)


def beyond(rows: Sequence[Row], target: plots.Sheet) -> Path:
    """Needles found with their intervals beside perplexity, a line for a length, a method and a rope."""
    plt = plots._pyplot()
    names = sorted({(r["length"], METHODS.index(r["method"]), r["rope"]) for r in rows})
    figure, axes = plt.subplots(
        1, 2, figsize=(14, 1.5 + 0.42 * len(names)), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, measure in zip(axes[0], ("needle", "perplexity"), strict=True):
        known = {(r["length"], METHODS.index(r["method"]), r["rope"]) for r in rows if r["measure"] == measure}
        for place in (place for place, name in enumerate(names) if name not in known):
            axis.text(
                0.03, place, "not measured", transform=axis.get_yaxis_transform(), va="center", fontsize=10, color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            )  # fmt: skip
        for r in rows:
            place = names.index((r["length"], METHODS.index(r["method"]), r["rope"]))
            if r["measure"] != measure or r.get("depth", "mean") != "mean":
                continue
            x = r["score" if measure == "needle" else "perplexity"]
            text = f"{x:.0f}" if measure == "needle" else f"{x:.1f}"
            low, high = (r["low"], r["high"]) if measure == "needle" else (x, x)
            _dot(axis, STYLES[r["method"]], place, x, low, high, text)
    axes[0, 0].set_xlim(-3, 103)
    axes[0, 0].set_xlabel("needles found (%), 95% interval")
    axes[0, 1].set_xscale("log")
    axes[0, 1].set_xmargin(0.1)
    axes[0, 1].set_xlabel("perplexity")
    labels = [f"{length_name(n)}, {METHODS[m]}, {rope or 'as trained'}" for n, m, rope in names]
    axes[0, 0].set_yticks(range(len(names)), labels)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.8)
    figure.suptitle(target.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return plots._save(plt, figure, target)

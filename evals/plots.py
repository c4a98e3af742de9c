"""The report's pictures. Every function writes one PNG and returns its path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apb_jax.files import whole_file
from apb_jax.install import install_hint
from evals.base import EvalError
from evals.tables import length_name, score_interval

# Okabe and Ito's colours: told apart by colour-blind readers, in grey print by their order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B5B5B", "#9467BD")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = "●■▲◆▼✚✖★", "○□△◇▽✢✕☆"
"""The markers as characters: filled for the first methods, open for those that use the colours a second time."""

# Low to high, the colours of the original needle pictures.
NEEDLE_COLOURS = ("#F0496E", "#EBB839", "#0CD79F")

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "xtick.color": "#30343b",
    "ytick.color": "#30343b",
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 1.0,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class NoMatplotlib(EvalError):
    """Pictures cannot be drawn here."""


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib(f"plots need matplotlib: {install_hint('evals')}") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    return plt


@dataclass(frozen=True)
class Sheet:
    """Where a picture goes and what it says beside the data.

    Attributes:
      note: the model and the number of samples.
      styles: series name -> number of its colour and marker, the same for every picture of a page.
    """

    title: str
    note: str
    path: Path
    styles: Mapping[str, int]


def _save(plt, figure, sheet: Sheet) -> Path:
    figure.text(0.01, -0.01, sheet.note, ha="left", va="top", fontsize=10, color="#5b6470")
    path = sheet.path
    with whole_file(path) as part:
        figure.savefig(part, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return path


def _length_axis(axis, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_name(n) for n in lengths])
    axis.minorticks_off()
    pad = 1.12 if len(lengths) > 1 else 2
    axis.set_xlim(min(lengths) / pad, max(lengths) * pad)
    axis.set_xlabel("length (tokens)")


def _end_labels(axis, ends: Sequence[tuple[str, float, float, str]], *, log: bool = False) -> None:
    """Write each series' name beside its last point, apart from one another."""
    from matplotlib.patheffects import withStroke

    low, high = axis.get_ylim()
    to, back = (np.log10, lambda v: 10**v) if log else (float, float)
    gap = (to(high) - to(low)) * 0.055
    ends = sorted(ends, key=lambda end: end[2])
    heights = spread([float(to(end[2])) for end in ends], gap, float(to(low)))
    for (name, x, _, colour), height in zip(ends, heights, strict=True):
        axis.annotate(
            name,
            (x, back(height)),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=4, foreground="white")],  # no axis strikes a name out
        )


def spread(heights: Sequence[float], gap: float, bottom: float) -> list[float]:
    """Ascending heights moved as little as it takes to lie ``gap`` apart: those too close stand around their middle."""
    groups: list[list[float]] = []

    def first(group: list[float]) -> float:
        return max(bottom, sum(group) / len(group) - gap * (len(group) - 1) / 2)

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and first(groups[-2]) + gap * len(groups[-2]) > first(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    return [first(group) + gap * i for group in groups for i in range(len(group))]


def _line(axis, number: int, x, y, label: str) -> tuple[str, float, float, str]:
    """The ``number``-th method's line; returns what its label needs. Two rounds of colours look different."""
    again, style = divmod(number, len(COLOURS))
    colour, marker = COLOURS[style], MARKERS[style % len(MARKERS)]
    face, dashes = (colour, "-") if not again else ("white", "--")
    axis.plot(x, y, dashes, color=colour, marker=marker, markersize=8, markerfacecolor=face, linewidth=2.4)
    return f"{GLYPHS[min(again, 1)][style % len(MARKERS)]} {label}", x[-1], y[-1], colour


def _band(results: Sequence[Mapping[str, Any]], length: int) -> tuple[float, float]:
    """How far the interval of the mean over a length's tasks reaches below and above it (MOVER: Zou, Donner 2008)."""
    here = [r for r in results if r["length"] == length]
    spans = [score_interval(r) for r in here]
    below = sum((r["score"] - low) ** 2 for r, (low, _) in zip(here, spans, strict=True))
    above = sum((high - r["score"]) ** 2 for r, (_, high) in zip(here, spans, strict=True))
    return below**0.5 / len(here), above**0.5 / len(here)


def score_over_length(metrics: Mapping[str, Mapping[str, Any]], sheet: Sheet) -> Path:
    """Mean score of each method over length, with the 95% interval of the mean as a band."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5))
    lengths = sorted({int(n) for m in metrics.values() for n in m["mean_by_length"]})
    ends = []
    for method, result in metrics.items():
        points = sorted((int(n), value["score"]) for n, value in result["mean_by_length"].items())
        x, y = np.array(points).T
        below, above = np.array([_band(result["results"], length) for length, _ in points]).T
        colour = COLOURS[sheet.styles[method] % len(COLOURS)]
        if len(x) > 1:
            axis.fill_between(
                x, np.maximum(0, y - below), np.minimum(100, y + above), color=colour, alpha=0.15, linewidth=0
            )
        ends.append(_line(axis, sheet.styles[method], x, y, f"{method}  {y[-1]:.1f}"))
    axis.set_ylim(0, 104)
    axis.set_ylabel("mean score (%)")
    _length_axis(axis, lengths)
    _end_labels(axis, ends)
    axis.set_title(sheet.title)
    return _save(plt, figure, sheet)


def task_grid(metrics: Mapping[str, Mapping[str, Any]], sheet: Sheet) -> Path:
    """Tasks down, methods and lengths across, score in every cell."""
    plt = _pyplot()
    tasks = list(dict.fromkeys(r["task"] for m in metrics.values() for r in m["results"]))
    lengths = sorted({r["length"] for m in metrics.values() for r in m["results"]})
    columns = [(method, length) for method in metrics for length in lengths]
    values = np.full((len(tasks), len(columns)), np.nan)
    for method, result in metrics.items():
        for r in result["results"]:
            values[tasks.index(r["task"]), columns.index((method, r["length"]))] = r["score"]
    figure, axis = plt.subplots(figsize=(max(5.0, 0.9 * len(columns)), 1.2 + 0.42 * len(tasks)))
    _cells(axis, values, lambda v: f"{v:.0f}")
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_xticks(range(len(columns)), [length_name(length) for _, length in columns])
    axis.xaxis.tick_top()
    for i, method in enumerate(metrics):
        middle = i * len(lengths) + (len(lengths) - 1) / 2
        axis.annotate(
            method,
            (middle, 1),
            xytext=(0, 26),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            ha="center",
            fontweight="bold",
        )
        if i:
            axis.axvline(i * len(lengths) - 0.5, color="white", linewidth=7)
    axis.set_title(sheet.title, pad=52)
    return _save(plt, figure, sheet)


def _cells(axis, values: np.ndarray, text) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("needle", NEEDLE_COLOURS).with_extremes(bad="#eceef1")
    image = axis.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(np.arange(-0.5, values.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, values.shape[0]), minor=True)
    axis.grid(False)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if values.size <= 400:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                axis.text(j, i, text(value), ha="center", va="center", fontsize=10, color="#20242a")
    return image


def needle_heatmap(cells: Mapping[str, Mapping[tuple[int, int], float]], sheet: Sheet) -> Path:
    """One panel a method: depth downwards, length to the right, percent found in every cell.

    Args:
      cells: method -> {(length, depth percent): score 0..100}.
    """
    plt = _pyplot()
    lengths = sorted({length for values in cells.values() for length, _ in values})
    depths = sorted({depth for values in cells.values() for _, depth in values})
    width = max(3.4, 0.62 * len(lengths) + 1.2)
    height = max(3.2, 0.36 * len(depths) + 1)
    across = min(len(cells), max(1, int(16 // width)))
    down = -(-len(cells) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(across * width, down * height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    for axis, (method, found) in zip(axes.flat, cells.items(), strict=False):
        values = np.array([[found.get((length, depth), np.nan) for length in lengths] for depth in depths])
        image = _cells(axis, values, lambda v: f"{v:.0f}")
        axis.set_xticks(range(len(lengths)), [length_name(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d}%" for d in depths])
        axis.set_xlabel("context length (tokens)")
        axis.set_title(f"{method}: {np.nanmean(values):.0f}%", fontsize=14, pad=8)
    for row in axes:
        row[0].set_ylabel("depth of the needle")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("needle found (%)")
    figure.suptitle(sheet.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return _save(plt, figure, sheet)


def latency_over_length(metrics: Mapping[str, Mapping[str, Any]], sheet: Sheet) -> Path:
    """Prefill seconds (log-log) and, where timed, decode milliseconds per token."""
    plt = _pyplot()
    timed = any(r["decode_ms_per_token"] is not None for m in metrics.values() for r in m["results"])
    figure, axes = plt.subplots(1, 1 + timed, figsize=(8 + 5 * timed, 5), squeeze=False, layout="constrained")
    panels = [("prefill_s", "prefill (seconds)"), ("decode_ms_per_token", "decode (ms per token)")]
    lengths = sorted({r["length"] for m in metrics.values() for r in m["results"]})
    for axis, (name, label) in zip(axes[0], panels, strict=False):
        ends = []
        for method, result in metrics.items():
            points = [(r["length"], r[name]) for r in result["results"] if r[name]]
            if not points:
                continue
            x, y = np.array(points).T
            ends.append(_line(axis, sheet.styles[method], x, y, method))
        axis.set_yscale("log")
        axis.set_ylabel(label)
        _length_axis(axis, lengths)
        _plain_log_ticks(axis)
        _end_labels(axis, ends, log=True)
    figure.suptitle(sheet.title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    return _save(plt, figure, sheet)


def _plain_log_ticks(axis) -> None:
    """1, 2, 5, 10... instead of powers; at least a factor of two is shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_ylim()
    if high / low < 2:
        middle = (low * high) ** 0.5
        axis.set_ylim(middle / 1.5, middle * 1.5)
    low, high = axis.get_ylim()
    steps = [s * 10.0**e for e in range(-9, 9) for s in (1, 2, 5) if low <= s * 10.0**e <= high]
    few = len(steps) < 3  # a short span: even steps
    axis.yaxis.set_major_locator(MaxNLocator(5) if few else LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def perplexity_over_position(metrics: Mapping[str, Mapping[str, Any]], sheet: Sheet) -> Path:
    """Perplexity of each method over the position in the text."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5))
    lengths = sorted({r["length"] for m in metrics.values() for r in m["results"]})
    ends = []
    for method, result in metrics.items():
        x, y = np.array([(r["length"], r["perplexity"]) for r in result["results"]]).T
        ends.append(_line(axis, sheet.styles[method], x, y, f"{method}  {y[-1]:.2f}"))
    axis.set_ylabel("perplexity")
    axis.margins(y=0.25)
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]))
    _length_axis(axis, lengths)
    axis.set_xlabel("position in the text (tokens)")
    _end_labels(axis, ends)
    axis.set_title(sheet.title)
    return _save(plt, figure, sheet)

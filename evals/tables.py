"""Tables of results: plain rows of strings, for the terminal and for reports alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from apb_jax.synthetic.grading import wilson
from evals.ruler.scoring import effective_length, weighted_averages

ROW_NAMES = ("task", "length", "samples", "method")
"""Columns that say what a row is about; the others hold what was measured."""


@dataclass(frozen=True)
class Table:
    """``shades[row][column]``, where given, colours a cell from 0 (bad) to 1 (good)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict)


def length_name(length: int) -> str:
    """4096 -> "4K", 1048576 -> "1M", 5000 -> "5000"."""
    for unit, name in ((1024**2, "M"), (1024, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def score_interval(result: Mapping[str, Any]) -> tuple[float, float]:
    """95% Wilson interval (percent) of a task's mean score."""
    low, high = wilson(result["score"] / 100 * result["samples"], result["samples"])
    return 100 * low, 100 * high


def score_cell(result: Mapping[str, Any]) -> str:
    """Mean score with its interval: ``75.0 [30, 95]``."""
    low, high = score_interval(result)
    return f"{result['score']:.1f} [{low:.0f}, {high:.0f}]"


def score_tables(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[Table, Table]:
    """(means over tasks per method and length, every task) of RULER-like metrics by method."""
    lengths = sorted({int(n) for m in metrics.values() for n in m["mean_by_length"]})
    means, shades = [], {}
    for i, (method, result) in enumerate(metrics.items()):
        by_length = {int(n): value["score"] for n, value in result["mean_by_length"].items()}
        row = [method]
        for j, length in enumerate(lengths):
            row.append(f"{by_length[length]:.2f}" if length in by_length else "")
            if length in by_length:
                shades[i, j + 1] = by_length[length] / 100
        means.append(tuple(row))
    header = ("method", *(length_name(n) for n in lengths))

    scores = {(m, r["task"], r["length"]): r for m, result in metrics.items() for r in result["results"]}
    tasks = list(dict.fromkeys(r["task"] for result in metrics.values() for r in result["results"]))
    columns = [(method, length) for length in lengths for method in metrics]
    rows, task_shades = [], {}
    for i, task in enumerate(tasks):
        row, samples = [task], set()
        for j, (method, length) in enumerate(columns):
            found = scores.get((method, task, length))
            row.append(score_cell(found) if found else "")
            if found:
                task_shades[i, j + 1] = found["score"] / 100
                samples.add(found["samples"])
        rows.append((*row, "/".join(map(str, sorted(samples)))))
    head = ("task", *(f"{method} {length_name(length)}" for method, length in columns), "samples")
    return Table(header, tuple(means), shades), Table(head, tuple(rows), task_shades)


def ruler_notes(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Effective length, and the weighted averages where all six lengths and 13 tasks were run."""
    notes = []
    for method, result in metrics.items():
        by_length = {int(n): v["score"] for n, v in result["mean_by_length"].items() if v["tasks"] == 13}
        if not by_length:
            continue
        reached = effective_length(by_length)
        text = f"{method}: effective length {length_name(reached) if reached else 'below every tested length'}"
        weighted = weighted_averages(by_length)
        if weighted:
            text += f"; weighted averages {weighted[0]} (increasing), {weighted[1]} (decreasing)"
        notes.append(text)
    return notes


def latency_table(metrics: Mapping[str, Mapping[str, Any]], baseline: str | None) -> Table:
    """Prefill seconds, decode milliseconds and APB's tokens per second; ratios to ``baseline`` where given."""
    reference = (
        {r["length"]: r for r in metrics[baseline]["results"]} if baseline is not None and baseline in metrics else {}
    )
    header = ["length", "method", "tokens", "prefill s", "min–max s", "decode ms/token", "tok/s (APB)"]
    if reference:
        header += [f"prefill vs {baseline}", f"tok/s vs {baseline}"]
    lengths = sorted({r["length"] for m in metrics.values() for r in m["results"]})
    rows = []
    for length in lengths:
        for method, result in metrics.items():
            for r in result["results"]:
                if r["length"] != length:
                    continue
                decode = r["decode_ms_per_token"]
                row = [
                    length_name(length),
                    method,
                    str(r["prompt_tokens"]),
                    f"{r['prefill_s']:.5f}",
                    f"{r['prefill_min_s']:.4f}–{r['prefill_max_s']:.4f}",
                    f"{decode:.2f}" if decode is not None else "not timed",
                    f"{r['tokens_per_s']:.2f}",
                ]
                base = reference.get(length)
                if base:
                    row.append(f"{base['prefill_s'] / r['prefill_s']:.2f}x")
                    row.append(f"{r['tokens_per_s'] / base['tokens_per_s']:.2f}x")
                elif reference:
                    row += ["", ""]
                rows.append(tuple(row))
    return Table(tuple(header), tuple(rows))


def perplexity_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    lengths = sorted({r["length"] for m in metrics.values() for r in m["results"]})
    rows = []
    for method, result in metrics.items():
        values = {r["length"]: f"{r['perplexity']:.4f}" for r in result["results"]}
        rows.append((method, *(values.get(length, "") for length in lengths)))
    return Table(("method", *(length_name(n) for n in lengths)), tuple(rows))


def print_metrics(benchmark: str, metrics: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The run's result on the terminal."""
    if benchmark == "perplexity":
        tables: Sequence[Table] = [perplexity_table(metrics)]
    elif benchmark == "latency":
        tables = [_without(latency_table(metrics, None), ("min–max s",))]
    elif benchmark == "needle":
        tables = [score_tables(metrics)[0]]
    else:
        tables = [_narrow_score_table(metrics), score_tables(metrics)[0]]
    for table in [part for whole in tables for part in fitting(whole, console.width)]:
        shown = RichTable()
        for i, name in enumerate(table.header):
            shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def fitting(table: Table, width: int) -> list[Table]:
    """The table cut between columns into as many as ``width`` characters need; each begins with what names its rows."""
    sizes = [max(map(len, column)) + 3 for column in zip(table.header, *table.rows, strict=True)]
    keys = next(n for n, name in enumerate((*table.header, "")) if name not in ROW_NAMES)
    groups: list[list[int]] = [[]]
    for number in range(keys, len(sizes)):
        if groups[-1] and sum(sizes[:keys]) + sum(sizes[n] for n in (*groups[-1], number)) + 1 > width:
            groups.append([])
        groups[-1].append(number)
    return [_columns(table, [*range(keys), *group]) for group in groups]


def _narrow_score_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per task and length, a column per method: fits a terminal."""
    found = {(r["task"], r["length"], m): r for m, result in metrics.items() for r in result["results"]}
    rows = []
    for task, length in dict.fromkeys((task, length) for task, length, _ in found):
        cells = [found.get((task, length, method)) for method in metrics]
        samples = "/".join(sorted({str(cell["samples"]) for cell in cells if cell}))
        scores = [score_cell(cell) if cell else "" for cell in cells]
        rows.append((task, length_name(length), samples, *scores))
    return Table(("task", "length", "samples", *metrics), tuple(rows))


def _without(table: Table, columns: Sequence[str]) -> Table:
    return _columns(table, [i for i, name in enumerate(table.header) if name not in columns])


def _columns(table: Table, keep: Sequence[int]) -> Table:
    return Table(tuple(table.header[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in table.rows))

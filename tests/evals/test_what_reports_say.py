"""What a reader takes from a report is what was measured: pictures the right way up, ratios, errors, text as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals import plots
from evals.latency.break_even import break_even
from evals.page import Details, Heading, Paragraph, Section, to_html
from evals.runner import _statistics
from evals.tables import Table, latency_table

SHEET = plots.Sheet("needle", "a note", Path("unused.png"), {"full": 0, "apb": 1})


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that would have been saved."""
    pytest.importorskip("matplotlib")
    kept: list[Any] = []

    def save(plt: Any, figure: Any, sheet: plots.Sheet) -> Path:
        figure.canvas.draw()
        plt.close(figure)
        kept.append(figure)
        return sheet.path

    monkeypatch.setattr(plots, "_save", save)
    return kept


def shown(axis: Any) -> dict[tuple[str, str], float]:
    """(label of the row, label of the column) -> value of an image, found by where they are drawn on the screen."""
    (image,) = axis.images
    values = np.asarray(image.get_array())
    left, right, bottom, top = image.get_extent()
    rows, columns = values.shape
    # Row 0 stands at the upper end of the extent where the image's origin is above.
    first_row_y, last_row_y = (top - 0.5 * np.sign(top - bottom), bottom + 0.5 * np.sign(top - bottom))
    if image.origin == "lower":
        first_row_y, last_row_y = last_row_y, first_row_y
    rows_at = np.linspace(first_row_y, last_row_y, rows)
    columns_at = np.linspace(left + 0.5, right - 0.5, columns)
    y_labels = {float(y): label.get_text() for y, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}
    x_labels = {float(x): label.get_text() for x, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)}
    return {
        (y_labels[float(y)], x_labels[float(x)]): float(values[i, j])
        for i, y in enumerate(rows_at)
        for j, x in enumerate(columns_at)
    }


def test_needle_map_shows_every_cell_in_its_place_and_depth_grows_downwards(figures: list[Any]) -> None:
    lengths, depths = (1024, 2048, 4096), (0, 50, 100)
    cells = {(n, d): float(10 * i + 30 * j) for i, n in enumerate(lengths) for j, d in enumerate(depths)}
    plots.needle_heatmap({"full": cells}, SHEET)
    axis = figures[0].axes[0]
    names = {1024: "1K", 2048: "2K", 4096: "4K"}
    assert shown(axis) == {(f"{d}%", names[n]): value for (n, d), value in cells.items()}
    texts = {tuple(map(float, text.get_position())): text.get_text() for text in axis.texts}
    for (i, n), (j, d) in ((a, b) for a in enumerate(lengths) for b in enumerate(depths)):
        assert texts[float(i), float(j)] == f"{cells[n, d]:.0f}"
    heights = {label.get_text(): axis.transData.transform((0, y))[1]
               for y, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}  # fmt: skip
    assert heights["0%"] > heights["50%"] > heights["100%"]  # on the screen, upwards


def test_needle_map_is_green_where_found_and_red_where_lost(figures: list[Any]) -> None:
    plots.needle_heatmap({"full": {(1024, 0): 0.0, (1024, 100): 100.0}}, SHEET)
    (image,) = figures[0].axes[0].images
    (lost, found) = image.to_rgba(image.get_array())[:, 0, :3]
    assert lost[0] > lost[1]
    assert found[1] > found[0]


def test_task_grid_puts_scores_under_their_method_and_length(figures: list[Any]) -> None:
    metrics = {
        name: {"results": [{"task": t, "length": n, "score": base + 10.0 * i + j, "samples": 4}
                           for i, t in enumerate(("vt", "qa_1")) for j, n in enumerate((1024, 2048))]}
        for name, base in (("full", 50.0), ("apb", 20.0))
    }  # fmt: skip
    plots.task_grid(metrics, SHEET)
    axis = figures[0].axes[0]
    values = np.asarray(axis.images[0].get_array())
    assert values.tolist() == [[50, 51, 20, 21], [60, 61, 30, 31]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["vt", "qa_1"]
    assert axis.transData.transform((0, 0))[1] > axis.transData.transform((0, 1))[1]


def test_a_speed_up_is_the_others_time_over_ours() -> None:
    """Twice as fast is 2x, in time and in tokens per second."""

    def row(prefill_s: float, tokens_per_s: float) -> dict[str, Any]:
        return {
            "length": 1024, "prompt_tokens": 1000, "prefill_s": prefill_s, "prefill_min_s": prefill_s,
            "prefill_max_s": prefill_s, "decode_ms_per_token": None, "tokens_per_s": tokens_per_s,
        }  # fmt: skip

    table = latency_table({"full": {"results": [row(4.0, 100.0)]}, "apb": {"results": [row(2.0, 300.0)]}}, "full")
    by_method = {line[1]: dict(zip(table.header, line, strict=True)) for line in table.rows}
    assert by_method["apb"]["prefill vs full"] == "2.00x"
    assert by_method["apb"]["tok/s vs full"] == "3.00x"
    assert by_method["full"]["prefill vs full"] == "1.00x"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({1024: 2.0, 4096: 2.0}, "faster from about 2,048 tokens on (measured at 1K and 4K)"),
        ({1024: 0.5, 4096: 1.0}, "faster at every length measured, from 1K on"),
        ({1024: 1.0, 4096: 5.0}, "faster at no length measured, up to 4K"),
        ({1024: 0.5, 4096: 5.0}, "faster at 1K"),
        ({512: 1.0}, "not measured at any length of both"),
    ],
)
def test_break_even(seconds: dict[int, float], words: str) -> None:
    """Full attention takes 1 s at 1K and 4 s at 4K; the ratio is a straight line on logarithmic scales."""
    assert break_even({1024: 1.0, 4096: 4.0}, seconds) == words


def test_standard_error_is_that_of_the_mean() -> None:
    """Sample standard deviation over the square root of the count: 0.5774 / 2 for two of four right."""
    rows = [{"score": score, "pred": "x"} for score in (1.0, 1.0, 0.0, 0.0)]
    assert _statistics(rows)["standard_error"] == pytest.approx(100 * math.sqrt(1 / 3) / 2, abs=0.01)
    assert _statistics(rows * 4)["standard_error"] == pytest.approx(100 * math.sqrt(4 / 15) / 4, abs=0.01)
    assert _statistics(rows)["score"] == 50.0


def test_everything_on_the_page_is_text() -> None:
    """Names of models, tasks and files come from outside: none of them is a tag, wherever it stands."""
    evil = '<b onclick="x">&'
    table = Table((f"h{evil}", "k"), ((f"row{evil}", f"cell{evil}"), ("shaded", f"shade{evil}")), {(1, 1): 0.5})
    blocks = [Heading(f"head{evil}"), Paragraph(f"para{evil}"), Details(f"sum{evil}", f"body{evil}"), table]
    page = to_html(f"title{evil}", f"lead{evil}", [Section(f"section{evil}", blocks)])
    assert "<b " not in page
    assert 'onclick="' not in page
    safe = "&lt;b onclick=&quot;x&quot;&gt;&amp;"
    for place in ("h", "row", "cell", "shade", "head", "para", "sum", "body", "title", "lead", "section"):
        assert f"{place}{safe}" in page, place

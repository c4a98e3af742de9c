"""A report's page as its reader meets it: one look for a method, axes that can be read, any screen, no unknown word."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_system
import pytest

from evals import plots
from evals.page import Picture, Section, to_html
from evals.report import write_report
from evals.tables import length_name

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

COMMANDS = {
    "ruler": "ruler --method third,full --seq 2k,4k --samples 4 --tasks vt,niah_single_1",
    "map": "needle --method forgetful --seq 1k,2k --depths 5",
    "four": "needle --method forgetful,third --seq 2k,4k --four 3",
    "perplexity": "perplexity --method third --seq 1k,2k --window 100",
    "latency": "latency --method full,forgetful,third --seq 1k,2k --repeats 2",
}
"""Every chart with other methods, so that a method stands at another place in each."""
NUMBERS = {"ruler": "4 samples", "map": "5 samples", "four": "3 samples", "latency": "mean of 2 runs"}


@dataclass
class Report:
    """A page, its Markdown, and every figure with the sheet that it was drawn on."""

    page: str
    markdown: str
    drawn: list[tuple[Any, plots.Sheet]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("runs")
    drawn: list[tuple[Any, plots.Sheet]] = []
    save = plots._save

    def kept(plt: Any, figure: Any, sheet: plots.Sheet) -> Path:
        figure.canvas.draw()
        drawn.append((figure, sheet))
        return save(plt, figure, sheet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fake_system.METHODS, "third", 0.8)
        patch.setattr(plots, "_save", kept)
        for name, line in COMMANDS.items():
            assert fake_system.run([*line.split(), "--model", "regex", "--out", str(out / name)]) == 0, name
        write_report([out], out / "report")
    pages = [(out / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]
    return Report(*pages, drawn)


# -- pictures ---------------------------------------------------------------------------------------------------------


def series(axis: Any) -> dict[str, tuple[str, str, str, str]]:
    """Name of a chart's line -> its colour, marker, dashes, and the marker's character beside the name."""
    lines = {to_hex(line.get_color()): line for line in axis.lines}
    assert len(lines) == len(axis.lines), "two lines of one colour"
    found = {}
    for label in axis.texts:
        glyph, name = label.get_text().split()[:2]
        colour = to_hex(label.get_color())
        found[name] = (colour, lines[colour].get_marker(), lines[colour].get_linestyle(), glyph)
    assert len(found) == len(lines)
    return found


def test_a_method_looks_the_same_in_all_charts(report: Report) -> None:
    """Whatever other methods a chart holds: a reader who has learnt a colour need not read the next legend."""
    axes = [axis for figure, _ in report.drawn for axis in figure.axes]
    charts = [series(axis) for axis in axes if axis.lines and not axis.images]
    assert len({tuple(chart) for chart in charts}) >= 4, "the charts hold different methods"
    looks = {name: {chart[name] for chart in charts if name in chart} for name in ("full", "forgetful", "third")}
    assert all(len(different) == 1 for different in looks.values()), looks
    for part in range(4):
        if part != 2:  # all are solid
            assert len({look[part] for (look,) in looks.values()}) == 3


def test_bands_have_the_colour_of_their_line(report: Report) -> None:
    bands = [axis for figure, _ in report.drawn for axis in figure.axes if axis.lines and axis.collections]
    assert bands
    for axis in bands:
        colours = [to_hex(band.get_facecolor()[0]) for band in axis.collections]
        assert colours == [to_hex(line.get_color()) for line in axis.lines]


def test_more_methods_than_colours_still_differ(tmp_path: Path) -> None:
    """The second round of colours has hollow markers and dashes."""
    names = [f"method{n}" for n in range(2 * len(plots.COLOURS))]
    drawn = []

    def keep(plt: Any, figure: Any, sheet: plots.Sheet) -> Path:
        drawn.append(figure)
        plt.close(figure)
        return sheet.path

    metrics = {name: {"results": [{"length": 1024, "perplexity": 9.0 + n}]} for n, name in enumerate(names)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", keep)
        styles = {name: n for n, name in enumerate(names)}
        plots.perplexity_over_position(metrics, plots.Sheet("", "", tmp_path / "x.png", styles))
    (axis,) = drawn[0].axes
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()) for line in axis.lines
    }
    glyphs = {label.get_text()[0] for label in axis.texts}
    assert len(looks) == len(glyphs) == len(names)


def test_every_picture_names_the_model(report: Report) -> None:
    """A picture is copied into a talk without the page around it."""
    assert len(report.drawn) >= 6
    for figure, sheet in report.drawn:
        assert sheet.note in [text.get_text() for text in figure.texts], "it is drawn, not only known"
        assert sheet.note.startswith("regex; ")


def test_pictures_say_over_how_many_samples(report: Report) -> None:
    """Which is what a reader needs to believe a difference; timings say how many runs."""
    notes = {sheet.title: sheet.note for _, sheet in report.drawn}
    wanted = {
        "RULER: mean score over length": "ruler",
        "RULER: every task": "ruler",
        "Needle in a haystack": "map",
        "Four needles: tests passed": "four",
        "Latency over length": "latency",
    }
    assert set(wanted) <= set(notes)
    for title, name in wanted.items():
        assert NUMBERS[name] in notes[title], title


def in_view(ticks: Any, labels: Any, limits: tuple[float, float]) -> dict[float, str]:
    """Tick -> label of those that stand on the axis."""
    low, high = sorted(limits)
    pairs = zip(ticks, labels, strict=True)
    return {float(at): label.get_text() for at, label in pairs if low <= at <= high and label.get_text()}


@pytest.mark.parametrize(
    "seconds",
    [(0.8, 95.0), (0.0012, 0.0013), (0.02, 0.05), (3.0, 3.1), (40.0, 900.0)],
    ids=lambda pair: f"{pair[0]:g} s",
)
def test_both_axes_of_the_latency_chart_can_be_read(
    seconds: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths as people write them, times as plain numbers: neither powers nor an axis without a number."""
    figures = []

    def keep(plt: Any, figure: Any, sheet: plots.Sheet) -> Path:
        figure.canvas.draw()
        plt.close(figure)
        figures.append(figure)
        return sheet.path

    monkeypatch.setattr(plots, "_save", keep)
    lengths = (4096, 32768, 131072, 1048576)
    times = [seconds[0] * (seconds[1] / seconds[0]) ** (i / 3) for i in range(4)]
    rows = [
        {"length": n, "prefill_s": time, "decode_ms_per_token": 30 + time}
        for n, time in zip(lengths, times, strict=True)
    ]
    plots.latency_over_length({"apb": {"results": rows}}, plots.Sheet("", "", tmp_path / "x.png", {"apb": 0}))
    axes = figures[0].axes
    assert len(axes) == 2
    for axis in axes:
        x = in_view(axis.get_xticks(), axis.get_xticklabels(), axis.get_xlim())
        assert x == {float(n): length_name(n) for n in lengths}
        y = in_view(axis.get_yticks(), axis.get_yticklabels(), axis.get_ylim())
        assert len(y) >= 2
        for at, text in y.items():
            assert re.fullmatch(r"\d+(\.\d+)?", text)
            assert float(text) == pytest.approx(at)
        assert axis.get_xlabel()
        assert axis.get_ylabel()


def test_the_page_shows_every_picture_and_says_what_it_is(report: Report, tmp_path: Path) -> None:
    """Also to who cannot see it."""
    captions = re.findall(r"!\[([^]]+)\]", report.markdown)
    assert len(captions) == len(report.drawn)
    assert re.findall(r'<img alt="([^"]+)"', report.page) == captions
    (tmp_path / "x.png").write_bytes(b"x")
    assert 'alt="a &lt;b&gt;"' in to_html("", "", [Section("", [Picture(tmp_path / "x.png", "a <b>")])])


# -- the page ---------------------------------------------------------------------------------------------------------


@dataclass
class Reader(HTMLParser):
    """Tables with the elements around them, header cells, and rows of text by section."""

    around: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: list[list[dict[str, str | None]]] = field(default_factory=list)
    headers: list[tuple[str, str | None]] = field(default_factory=list)
    rows: dict[str, list[list[str]]] = field(default_factory=dict)
    section: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "img"):
            return
        self.around.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([attributes for _, attributes in self.around])
        if tag == "th":
            inside = [name for name, _ in self.around if name in ("thead", "tbody")]
            self.headers.append((inside[-1], dict(attrs).get("scope")))
        if tag == "h2":
            self.section = ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("th", "td"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.around.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.around]
        if "h2" in tags:
            self.section += data
        if tags and tags[-1] in ("th", "td"):
            self.rows[self.section][-1][-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def rules(page: str, media: str | None = None) -> dict[str, str]:
    """Selector -> declarations of the page's style, outside of media queries or in one."""
    (css,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    queries = dict(re.findall(r"@media ?([^{]+?) ?\{((?:[^{}]*\{[^{}]*\})*)", css))
    outside = re.sub(r"@media[^{]+\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", css)
    css = outside if media is None else queries[media]
    found: dict[str, str] = {}
    for selectors, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        for selector in selectors.split(","):
            found[selector.strip()] = found.get(selector.strip(), "") + declarations
    return found


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("media", [None, "(prefers-color-scheme:dark)"], ids=["light", "dark"])
def test_text_stands_out_by_day_and_by_night(report: Report, media: str | None) -> None:
    """A browser that prefers dark gets light text on dark paper, with WCAG's contrast of 4.5 in both."""
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", rules(report.page, media)[":root"]))
    paper = luminance(colours["paper"])
    assert (paper < 0.1) == (media is not None)
    for name in ("ink", "soft", "accent"):
        dark, light = sorted((luminance(colours[name]), paper))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_header_cells_say_what_they_head(report: Report) -> None:
    """A screen reader reads a cell with its column and its row."""
    reader = read(report.page)
    assert len(reader.headers) > 20
    assert {scope for place, scope in reader.headers if place == "thead"} == {"col"}
    assert {scope for place, scope in reader.headers if place == "tbody"} == {"row"}
    assert sum(place == "tbody" for place, _ in reader.headers) == report.page.count('<tr><th scope="row"')


def test_tables_scroll_sideways_by_themselves(report: Report) -> None:
    """On a telephone the page keeps its width: each table scrolls in its own frame, by keys too, under a hint."""
    reader, style = read(report.page), rules(report.page)
    frames = [name for name, declarations in style.items() if "overflow-x:auto" in declarations]
    assert len(reader.tables) > 8
    for around in reader.tables:
        *_, frame, _ = around
        assert f".{frame['class']}" in frames
        assert frame["tabindex"] == "0"
    assert 'content="width=device-width,initial-scale=1"' in report.page
    assert "display:none" in style[".hint"]
    assert "display:block" in rules(report.page, "(max-width:700px)")[".hint"]


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_that_the_page_uses_are_explained(report: Report) -> None:
    """Names of RULER's program, of a chat wrapper and of a needle's wording mean nothing to a newcomer."""
    reader = read(report.page)
    assert list(reader.rows)[-1] == "Words"
    meaning = dict(row for row in reader.rows["Words"][1:])
    for word in ("ruler_main", "wrapper", "form"):
        assert re.search(rf"<p>[^<]*\b{word}\b", report.page), "the sections use it"
        assert len(meaning[word].split()) >= 3


def test_words_that_the_page_does_not_use_are_not_explained(tmp_path: Path) -> None:
    line = "needle --model regex --method full --seq 1k --depths 2 --out"
    assert fake_system.run([*line.split(), str(tmp_path)]) == 0
    write_report([tmp_path], tmp_path)
    words = {row[0] for row in read((tmp_path / "report.html").read_text(encoding="utf-8")).rows["Words"][1:]}
    assert "form" in words
    assert not {"ruler_main", "ruler_fit", "wrapper", "protocol"} & words
    assert json.loads((tmp_path / "full" / "config.json").read_text())["benchmark"] == "needle"

"""Reports: files, plots, one page without a network, and no table that mixes what may not be compared."""

import base64
import io
import json
import re
from itertools import pairwise

import pytest
from fake_system import run
from rich.console import Console

from evals.base import EvalError
from evals.page import escape
from evals.plots import spread
from evals.report import find_runs, write_report
from evals.tables import length_name, print_metrics, score_cell

matplotlib = pytest.importorskip("matplotlib")


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run of every benchmark under two methods, and its report."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--model", "regex", "--method", "full,forgetful"]
    commands = [
        ["ruler", *common, "--seq", "2k,4k", "--samples", "4", "--tasks", "vt,niah_single_1", "--out", f"{out}/main"],
        [
            "ruler",
            *common,
            "--seq",
            "2k",
            "--samples",
            "4",
            "--tasks",
            "vt",
            "--variant",
            "ruler_fit",
            "--out",
            f"{out}/fit",
        ],
        ["needle", *common, "--seq", "1k,2k,4k", "--depths", "5", "--out", f"{out}/needle"],
        ["needle", *common, "--seq", "2k,4k", "--four", "3", "--out", f"{out}/four"],
        ["perplexity", *common, "--seq", "1k,2k", "--window", "100", "--out", f"{out}/ppl"],
        ["latency", *common, "--seq", "1k,2k", "--repeats", "2", "--baseline", "full", "--out", f"{out}/latency"],
    ]
    for command in commands:
        assert run(command) == 0, command
    return out, write_report([out], out / "report")


def test_one_page_opens_without_a_network(report):
    out, _ = report
    page = (out / "report" / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert "<script" not in page
    assert "<link" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img ")
    assert len(pictures) >= 6
    for picture in pictures:
        width, height = png_size(base64.b64decode(picture))
        assert width > 500
        assert height > 300


def test_markdown_shows_every_picture_that_was_written(report):
    out, paths = report
    markdown = (out / "report" / "report.md").read_text()
    shown = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", markdown))
    assert shown == {path.name for path in paths if path.suffix == ".png"}
    assert shown == {path.name for path in (out / "report").glob("*.png")}


def test_variants_get_tables_of_their_own(report):
    out, _ = report
    sections = (out / "report" / "report.md").read_text().split("\n## ")
    ruler = [section for section in sections if section.startswith("RULER")]
    assert len(ruler) == 2
    assert "ruler_fit, wrapper base, seed 42" in ruler[0]
    assert "ruler_main, wrapper base" in ruler[1]
    assert "2K | 4K" in ruler[1]
    needle = [section for section in sections if section.startswith("Needle")]
    assert len(needle) == 2


def test_tables_hold_the_metrics(report):
    out, _ = report
    markdown = (out / "report" / "report.md").read_text()
    for path in out.glob("main/*/metrics.json"):
        for result in json.loads(path.read_text())["results"]:
            assert score_cell(result).replace("[", "\\[").replace("]", "\\]") in markdown
    assert "prefill vs full" in markdown
    assert "| 1.00x |" in markdown
    assert "share of the document: 0.55" in markdown  # what really ran


def test_exact_method_comes_first(report):
    out, _ = report
    markdown = (out / "report" / "report.md").read_text()
    *sections, words = markdown.split("\n## ")[1:]
    assert words.startswith("Words")
    for section in sections:
        assert section.index("full") < section.index("forgetful")


def test_overview_holds_the_figure_of_every_section(report):
    out, _ = report
    overview = (out / "report" / "report.md").read_text().split("\n## ")[1]
    assert overview.startswith("Overview")
    assert "| benchmark | kind | figure | full | forgetful |" in overview
    metrics = json.loads((out / "main" / "full" / "metrics.json").read_text())
    assert f"mean score (%) at 4K | {metrics['mean_by_length']['4096']['score']:.1f} |" in overview
    assert overview.count("\n| ") == 2 + 6
    page = (out / "report" / "report.html").read_text()
    assert "± " not in page
    assert '<th scope="row">' in page
    assert "<th>" not in page
    assert "Mean of 2: vt, niah_single_1." in page


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(EvalError, match="no run there"):
        find_runs([tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvalError, match="runs without metrics yet"):
        find_runs([tmp_path])


def test_length_names():
    assert [length_name(n) for n in (4096, 131072, 1048576, 5000, 1536)] == ["4K", "128K", "1M", "5000", "1536"]


def test_a_narrow_terminal_gets_several_tables_and_no_cut_cell():
    """Twelve methods in 80 columns: no line is longer, and every score stands on one line with its method above."""
    methods = [f"method_number_{i}" for i in range(12)]

    def result(i):
        scores = [{"task": task, "length": n, "score": i + n / 1e5, "standard_error": 1.0, "samples": 64}
                  for task in ("niah_multikey_1", "qa_2") for n in (4096, 8192)]  # fmt: skip
        means = {str(n): {"score": i + n / 1e5, "tasks": 2} for n in (4096, 8192)}
        return {"results": scores, "mean_by_length": means}

    out = io.StringIO()
    print_metrics("ruler", {m: result(i) for i, m in enumerate(methods)}, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(sum(m in line.split() for line in lines) == 2 for m in methods)  # as a column, and in the table of means
    assert sum(line.count(f"{11 + 0.04096:.1f} [") for line in lines) == 2


def test_labels_are_spread_around_their_middle():
    assert spread([0.0, 40.0, 41.0, 42.0, 90.0], 5.0, 0.0) == [0.0, 36.0, 41.0, 46.0, 90.0]
    assert spread([0.0, 0.0, 1.0], 5.0, 0.0) == [0.0, 5.0, 10.0]
    crowded = spread([40.0 + n / 10 for n in range(12)], 5.0, 0.0)
    assert all(b - a >= 5.0 - 1e-9 for a, b in pairwise(crowded))


def test_runs_of_other_seeds_or_data_get_sections_of_their_own(tmp_path):
    common = ["needle", "--model", "regex", "--method", "full", "--seq", "1k", "--depths", "2"]
    text = tmp_path / "text.txt"
    for name, words, seed in (("a", "one two. ", "1"), ("b", "one two. ", "2"), ("c", "three four. ", "1")):
        text.write_text(words * 800)
        command = [*common, "--text", str(text), "--seed", seed, "--out", str(tmp_path / "runs" / name)]
        assert run(command) == 0
    write_report([tmp_path / "runs"], tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.count("\n## Needle") == 3


def test_markdown_is_escaped():
    assert escape("a|b\n<img> *x* [y](z) `q` niah_single_1") == (
        "a\\|b &lt;img&gt; \\*x\\* \\[y\\](z) \\`q\\` niah_single_1"
    )

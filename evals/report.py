"""Reports from run folders: report.md, report.html and the plots beside them.

Runs are put into one table only if their prompts and scoring are the same: RULER variants, chat wrappers,
InfiniteBench templates and rules, needle forms and perplexity protocols get sections of their own.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.files import near_file, read_json, write_text
from evals import plots
from evals.base import UNSCORABLE, EvalError
from evals.latency.break_even import break_even
from evals.page import Block, Details, Heading, Paragraph, Picture, Section, to_html, to_markdown
from evals.store import read_rows
from evals.tables import Table, latency_table, length_name, perplexity_table, ruler_notes, score_tables

Draw = Callable[[str, str], plots.Sheet]
"""(title, end of the file's name) -> where a picture goes."""

WORDS = {
    "ruler_main": "RULER's main branch",
    "ruler_2024_06": "RULER as published in June 2024",
    "ruler_fit": "RULER's main wording, every prompt filled to its length",
    "star_attention": "RULER as in the Star Attention paper: document and question apart",
    "wrapper": "the chat format put around a prompt; base: none",
    "form": "how needle and question are worded, after the program named",
    "template": "which project's InfiniteBench prompts are used",
    "rule": "which project's scorer judges the answers",
    "protocol": "which tokens count: tail, the last window; minference, all",
    "window": "tokens scored after each prefill",
    "tok/s": "(prompt + generated tokens) / (prefill + decode seconds)",
    "interval": "where the true mean lies with 95% confidence (Wilson)",
    "prefill": "reading the prompt, up to the first new token",
    "decode": "each further token of the answer",
}


def _explained(sections: Sequence[Section]) -> Section:
    """The words of the page that a reader may not know."""
    text = to_markdown("", "", sections)
    rows = tuple((word, meaning) for word, meaning in WORDS.items() if word in text)
    return Section("Words", [Table(("word", "meaning"), rows)])


@dataclass(frozen=True)
class Run:
    """One finished or unfinished run."""

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]

    def __post_init__(self) -> None:
        if self.benchmark not in _SECTIONS:
            raise EvalError(f"{self.path}: unknown benchmark {self.benchmark!r}; there are: {', '.join(_SECTIONS)}")
        if not isinstance(self.config.get("system"), dict):
            raise EvalError(f"{self.path}: config.json does not say which system ran")
        if not isinstance(self.metrics, dict) or not isinstance(self.metrics.get("results"), list):
            raise EvalError(f"{self.path}: metrics.json holds no list of results")

    @property
    def benchmark(self) -> str:
        return str(self.config["benchmark"])

    @property
    def model(self) -> str:
        return str(self.config["system"].get("model", "unknown model"))

    @property
    def method(self) -> str:
        return str(self.config["system"].get("method", self.path.name))

    @property
    def data(self) -> dict[str, str]:
        """Hash of every text and record file of the run by name, where the run wrote it down."""
        places = [self.config, *(self.config.get("tasks") or [])]
        found = [place.get("data") for place in places]
        items = [item for held in found for item in (held if isinstance(held, list) else [held])]
        return {item["file"]: item["sha256"] for item in items if isinstance(item, dict)}

    @property
    def kind(self) -> str:
        """What separates scores that must not share a table, in words; other ``data`` does so too."""
        seeds = sorted({task["seed"] for task in self.config.get("tasks") or [] if "seed" in task})
        return self._form + (f", seed {'/'.join(map(str, seeds))}" if seeds else "")

    @property
    def _form(self) -> str:
        tasks = self.config.get("tasks") or []
        first = tasks[0] if tasks else {}
        if self.benchmark == "ruler":
            return f"{first['variant']}, wrapper {first['wrapper']}"
        if self.benchmark == "infinitebench":
            return f"template {first['template']}, {first['rule']} rule, at most {_lengths(tasks)} tokens"
        if self.benchmark == "needle":
            return f"form {first['form']}" if "form" in first else "four needles"
        if self.benchmark == "perplexity":
            return f"protocol {self.config['protocol']}, window {self.config['window']}"
        return f"{self.config['new_tokens']} new tokens" if self.config.get("kv", True) else "prefill alone, no KV"


def _lengths(tasks: Sequence[dict[str, Any]]) -> str:
    return "/".join(length_name(n) for n in sorted({task["length"] for task in tasks}))


def _other_data(run: Run, runs: Sequence[Run]) -> str:
    """The hashes of this run's files, where another run of its kind read other contents or other texts."""
    beside = [r for r in runs if (r.benchmark, r.model, r.kind) == (run.benchmark, run.model, run.kind)]
    whole = run.benchmark in ("perplexity", "latency")  # one figure over all texts
    told = sorted(
        (file, digest)
        for file, digest in run.data.items()
        if any(r.data.get(file, None if whole else digest) != digest for r in beside)
    )
    return "".join(f", {file} {digest[:8]}" for file, digest in told)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run in or below the folders, in order of path."""
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise EvalError(f"{folder}: no such folder{near_file(folder)}")
        found = sorted(path.parent for path in folder.rglob("config.json"))
        complete = [path for path in found if (path / "metrics.json").is_file()]
        if not complete:
            state = "runs without metrics yet" if found else "no run"
            raise EvalError(f"{folder}: {state} there (a run has config.json and metrics.json)")
        for path in complete:
            config, metrics = (read_json(path / name, "run") for name in ("config.json", "metrics.json"))
            if isinstance(config, dict) and "benchmark" in config:
                runs.append(Run(path, config, metrics))
    return list({run.path.resolve(): run for run in runs}.values())


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md, report.html and PNG plots into ``out``; returns their paths."""
    runs = find_runs(folders)
    try:
        return _write(runs, out)
    except UserError:
        raise
    except (*UNSCORABLE, RecursionError) as error:  # a field of another kind than a run writes
        paths = ", ".join(str(run.path) for run in runs)
        raise EvalError(f"a run is damaged ({type(error).__name__}: {error}); one of {paths}") from error


def _write(runs: list[Run], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    runs.sort(key=lambda run: run.method != "full")  # the exact method first, and in the same colour everywhere
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.benchmark, run.model, run.kind + _other_data(run, runs)), []).append(run)
    order = {name: i for i, name in enumerate(_SECTIONS)}

    def rank(item: tuple[tuple[str, str, str], list[Run]]) -> tuple[int, tuple[str, ...]]:
        return order[item[0][0]], item[0][1:]

    styles = _styles(groups)
    sections = [_section(key, group, out, styles) for key, group in sorted(groups.items(), key=rank)]
    if len(groups) > 1:
        sections.insert(0, Section("Overview", [_overview(sorted(groups.items(), key=rank))]))
    sections.append(_explained(sections))
    models = ", ".join(sorted({run.model for run in runs}))
    title = f"Long-context evaluation of {models}"
    methods = ", ".join(dict.fromkeys(run.method for run in runs))
    lead = f"{len(runs)} runs; methods: {methods}"
    markdown, page = out / "report.md", out / "report.html"
    write_text(markdown, to_markdown(title, lead, sections))
    write_text(page, to_html(title, lead, sections))
    pictures = [block.path for s in sections for block in s.blocks if isinstance(block, Picture)]
    return [markdown, page, *pictures]


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    by_name: dict[str, Run] = {}
    for run in runs:  # two runs of a method are told apart by their folders
        name = (
            run.method if sum(r.method == run.method for r in runs) == 1 else f"{run.method} ({run.path.parent.name})"
        )
        by_name[name if name not in by_name else f"{run.method} ({run.path})"] = run
    return by_name


def _styles(groups: Mapping[tuple[str, str, str], list[Run]]) -> dict[str, int]:
    """A number for every series of the page: a method has one colour and marker in all pictures."""
    names = [name for runs in groups.values() for name in _named(runs)]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _samples(runs: Sequence[Run]) -> str:
    counts = sorted({r["samples"] for run in runs for r in run.metrics["results"] if "samples" in r})
    return f"; {'/'.join(map(str, counts))} samples a task and length" if counts else ""


def _section(key: tuple[str, str, str], runs: list[Run], out: Path, styles: Mapping[str, int]) -> Section:
    benchmark, model, kind = key
    by_name = _named(runs)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(key)).strip("-").lower()
    note = f"{model}; {kind}{_samples(runs)}"
    if benchmark == "latency":
        note += f"; mean of {runs[0].config['repeats']} runs"

    def draw(title: str, end: str) -> plots.Sheet:
        return plots.Sheet(title, note, out / f"{stem}{end}.png", styles)

    blocks = _SECTIONS[benchmark](by_name, draw)
    return Section(f"{_TITLES[benchmark]}: {model}", [Paragraph(f"{kind}."), *blocks, *_how(by_name)])


def _overview(groups: Sequence[tuple[tuple[str, str, str], list[Run]]]) -> Table:
    """One row a section: its figure at the longest length, per method."""
    methods = list(dict.fromkeys(run.method for _, runs in groups for run in runs))
    rows, shades = [], {}
    for i, ((benchmark, model, kind), runs) in enumerate(groups):
        name, field = _HEADLINES[benchmark]
        cells = {}
        for run in runs:
            if benchmark in ("perplexity", "latency"):
                last = run.metrics["results"][-1]
                length, value = last["length"], last[field]
                cells[run.method] = f"{value:.4g}"
            else:
                length = max(int(n) for n in run.metrics["mean_by_length"])
                value = run.metrics["mean_by_length"][str(length)]["score"]
                cells[run.method] = f"{value:.1f}"
                shades[i, 3 + methods.index(run.method)] = value / 100
        rows.append(
            (f"{_TITLES[benchmark]}: {model}", kind, f"{name} at {length_name(length)}", *map(cells.get, methods))
        )
    filled = tuple(tuple(cell or "" for cell in row) for row in rows)
    return Table(("benchmark", "kind", "figure", *methods), filled, shades)


_TITLES = {
    "ruler": "RULER",
    "infinitebench": "InfiniteBench",
    "needle": "Needle in a haystack",
    "perplexity": "Perplexity",
    "latency": "Latency",
}
_HEADLINES = {
    "ruler": ("mean score (%)", ""),
    "infinitebench": ("mean score (%)", ""),
    "needle": ("found (%)", ""),
    "perplexity": ("perplexity", "perplexity"),
    "latency": ("prefill (s)", "prefill_s"),
}


def _picture(draw: Callable[[Any, plots.Sheet], Path], data: Any, sheet: plots.Sheet, caption: str) -> list[Block]:
    """The picture, or a line in its place where matplotlib is missing: the tables hold the same figures."""
    try:
        return [Picture(draw(data, sheet), caption)]
    except plots.NoMatplotlib as error:
        return [Paragraph(f"Without the picture ({caption}): {error}.")]


def _metrics(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    return {name: run.metrics for name, run in runs.items()}


def _score_blocks(title: str) -> Callable[[dict[str, Run], Draw], list[Block]]:
    def blocks(runs: dict[str, Run], draw: Draw) -> list[Block]:
        metrics = _metrics(runs)
        means, tasks = score_tables(metrics)
        result: list[Block] = []
        if len(means.header) > 2:
            sheet = draw(f"{title}: mean score over length", "-length")
            result += _picture(plots.score_over_length, metrics, sheet, "Mean score of each method over length")
        result += [Heading("Mean over tasks"), means, *_covered(metrics)]
        result += [Paragraph(note) for note in ruler_notes(metrics)]
        result += [Heading("Every task (mean score [95% Wilson interval])")]
        if len(tasks.header) > 3:  # task, one column, samples: the table says it all
            sheet = draw(f"{title}: every task", "-tasks")
            result += _picture(plots.task_grid, metrics, sheet, "Score of every task")
        result.append(tasks)
        sizes = {(r["length"], m["tasks"]) for s in metrics.values() for r in s["results"] for m in [_mean(s, r)]}
        if len({tasks_run for _, tasks_run in sizes}) > 1:
            result.append(Paragraph("The means are over different numbers of tasks: compare task by task."))
        return result

    return blocks


def _covered(metrics: dict[str, dict[str, Any]]) -> list[Block]:
    """Which tasks the means are over, and how many answers could not be scored."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, result in metrics.items():
        for length in sorted({r["length"] for r in result["results"]}):
            tasks = tuple(r["task"] for r in result["results"] if r["length"] == length)
            found.setdefault(tasks, []).append(f"{name} at {length_name(length)}")
    lost = sum(r.get("unscored", 0) for m in metrics.values() for r in m["results"])
    lines = [f"Mean of {len(tasks)}: {', '.join(tasks)}" for tasks in found]
    if len(found) > 1:
        lines = [f"{line} ({', '.join(where)})" for line, where in zip(lines, found.values(), strict=True)]
    if lost:
        lines.append(f"{lost} answers could not be scored and are in no mean; their rows in predictions.jsonl say why")
    return [Paragraph(f"{line}.") for line in lines]


def _mean(metrics: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return metrics["mean_by_length"][str(result["length"])]


def _needle_blocks(runs: dict[str, Run], draw: Draw) -> list[Block]:
    metrics = _metrics(runs)
    means, _ = score_tables(metrics)
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for name, run in runs.items():
        sums: dict[tuple[int, int], list[float]] = {}
        for row in read_rows(run.path):
            if "depth" in row["info"]:
                sums.setdefault((row["length"], row["info"]["depth"]), []).append(row["score"])
        cells[name] = {cell: 100 * sum(scores) / len(scores) for cell, scores in sums.items()}
    if any(cells.values()):
        sheet, caption = draw("Needle in a haystack", ""), "Share of needles found by length and depth"
        picture = _picture(plots.needle_heatmap, cells, sheet, caption)
    else:
        sheet, caption = draw("Four needles: tests passed", ""), "Share of tests passed over length"
        picture = _picture(plots.score_over_length, metrics, sheet, caption)
    return [*picture, Heading("Found (%)"), means]


def _latency_blocks(runs: dict[str, Run], draw: Draw) -> list[Block]:
    metrics = _metrics(runs)
    wanted = next((run.config.get("baseline") for run in runs.values() if run.config.get("baseline")), None)
    sheet = draw("Latency over length", "")
    picture = _picture(plots.latency_over_length, metrics, sheet, "Prefill and decode times over length")
    first = next(iter(runs.values())).config
    note = (
        f"Mean of {first['repeats']} runs after {first['warmups']} untimed; timed: {first['timed']}. "
        "tok/s is the APB paper's: (prompt + generated tokens) / (prefill + decode seconds)."
    )
    prefill = {method: {r["length"]: r["prefill_s"] for r in m["results"]} for method, m in metrics.items()}
    against = [
        Paragraph(f"Prefill of {method} against {wanted}: {break_even(prefill[wanted], seconds)}.")
        for method, seconds in prefill.items()
        if wanted in prefill and method != wanted
    ]
    return [*picture, latency_table(metrics, wanted), *against, Paragraph(note)]


def _perplexity_blocks(runs: dict[str, Run], draw: Draw) -> list[Block]:
    metrics = _metrics(runs)
    sheet, caption = draw("Perplexity over position", ""), "Perplexity of each method over position"
    return [*_picture(plots.perplexity_over_position, metrics, sheet, caption), perplexity_table(metrics)]


_SECTIONS: dict[str, Callable[[dict[str, Run], Draw], list[Block]]] = {
    "ruler": _score_blocks("RULER"),
    "infinitebench": _score_blocks("InfiniteBench"),
    "needle": _needle_blocks,
    "perplexity": _perplexity_blocks,
    "latency": _latency_blocks,
}


def _how(runs: dict[str, Run]) -> list[Block]:
    """What really ran: budgets, dense layers, fallbacks; then the whole configurations, folded away."""
    rows = []
    for name, run in runs.items():
        seen: dict[str, set[int]] = {}
        for result in run.metrics["results"]:
            for facts in result.get("ran", []):
                text = "; ".join(f"{k}: {_plain(v)}" for k, v in facts.items() if k != "samples") or "nothing reported"
                seen.setdefault(text, set()).add(result["length"])
        for text, lengths in seen.items():
            rows.append((name, ", ".join(length_name(n) for n in sorted(lengths)), text))
    blocks: list[Block] = []
    if rows:
        blocks += [Heading("What ran"), Table(("method", "length", "as reported by the system"), tuple(rows))]
    configs = "\n".join(json.dumps({n: r.config}, indent=1, ensure_ascii=False) for n, r in runs.items())
    return [*blocks, Details("Configuration of these runs", configs)]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)

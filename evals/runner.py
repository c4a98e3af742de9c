"""Runs tasks through a generator: resumable, one sample in memory at a time, with progress and time left."""

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evals.ahead import ahead, batches
from evals.base import UNSCORABLE, BatchGenerator, Completion, EvalError, Example, Generator, Task
from evals.store import RunFolder

Report = Callable[[str, int], None]
"""(what is on the progress line, tokens done)."""
_PACKAGES = ("apb-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "nltk", "rouge-score")


def environment() -> dict[str, Any]:
    """Versions of everything that can move a number."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def run_config(benchmark: str, generator: Generator, tasks: Sequence[Task], samples: int | None) -> dict[str, Any]:
    """config.json: what was run on what. A run may be continued only with an equal configuration."""
    return {
        "benchmark": benchmark,
        "system": generator.describe(),
        "samples": samples,
        "tasks": [{"task": task.name, "length": task.length, **task.describe()} for task in tasks],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": environment(),
    }


def check_length(generator: Generator, length: int, what: str) -> None:
    """Refuse a length for which the model has no positions."""
    if generator.max_length is not None and length > generator.max_length:
        raise EvalError(
            f"{what}: {length} tokens exceed the model's {generator.max_length} positions; "
            f"the longest legal length is {generator.max_length}"
        )


def answer(generator: Generator, examples: Sequence[Example], what: str) -> list[dict[str, Any]]:
    """Generate and return the facts of some samples, together where there are several and the system can."""
    for example in examples:
        check_length(generator, generator.count(example.prompt) + example.max_new_tokens, f"{what} sample {example.id}")
    if len(examples) > 1 and isinstance(generator, BatchGenerator):
        completions = generator.generate_batch(examples)
    else:
        completions = [
            generator.generate(e.document, e.query, e.max_new_tokens, embedded_query=e.embedded_query) for e in examples
        ]
    return [_facts(example, completion) for example, completion in zip(examples, completions, strict=True)]


def _facts(example: Example, completion: Completion) -> dict[str, Any]:
    row = {
        "pred": completion.text,
        "outputs": list(example.references),
        "prompt_tokens": completion.prompt_tokens,
        "generated_tokens": completion.generated_tokens,
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
        "ran": dict(completion.facts),
        "info": dict(example.info),
    }
    if example.label is not None:
        row["label"] = example.label
    return row


def run_tasks(
    generator: Generator,
    tasks: Sequence[Task],
    folder: RunFolder,
    *,
    samples: int | None,
    console: Console,
    label: str,
    batch: int = 1,
) -> dict[str, Any]:
    """Run every task to its end and return (and write) the metrics.

    Args:
      batch: samples that go to the system together; their rows are those of one at a time, but for the times.
      samples: most samples of each task, None for all.
      label: what the progress line is called (the method).
    """
    for task in tasks:
        check_length(generator, task.length, f"{task.name} at length {task.length}")
    # Progress is counted in tokens: a sample at 128K takes longer than one at 4K.
    known = samples if samples is not None else 1
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(label, total=sum(task.length * known for task in tasks), note="")
        for task in tasks:
            _run_one(
                generator, task, folder, samples, batch, lambda note, n: progress.update(bar, advance=n, note=note)
            )
            metrics = summarise(folder, tasks)
            folder.write_metrics(metrics)
            if not console.is_terminal:  # a log file gets a line a task instead of a moving bar
                done = next(r for r in metrics["results"] if (r["task"], r["length"]) == (task.name, task.length))
                console.print(f"{label} {task.name} at {task.length}: {done['score']} ({done['samples']} samples)")
    return summarise(folder, tasks)


def _run_one(
    generator: Generator, task: Task, folder: RunFolder, samples: int | None, batch: int, report: Report
) -> None:
    what = f"{task.name} at {task.length}"
    total, count, scored, unscored = 0.0, 0, 0, ""
    for examples in batches(ahead(islice(task.examples(), samples), 2 * batch), batch):
        keys = [(task.name, task.length, example.id) for example in examples]
        todo = [example for example, key in zip(examples, keys, strict=True) if key not in folder.done]
        for example, facts in zip(todo, answer(generator, todo, what), strict=True):
            row = {"task": task.name, "length": task.length, "id": example.id, **_scored(task, example, facts["pred"])}
            folder.append(row | facts)
        for key in keys:
            row = folder.done[key]
            count += 1
            if row["score"] is None:
                unscored = row["unscored"]
            else:
                total += row["score"]
                scored += 1
            mean = f"{100 * total / scored:.1f}" if scored else "no score yet"
            report(f"{what}: {mean} ({scored} samples)", task.length)
    if count == 0:
        raise EvalError(f"{what}: the task holds no samples")
    if scored == 0:
        raise EvalError(f"{what}: none of the {count} answers can be scored ({unscored}); they are in {folder.path}")


def _scored(task: Task, example: Example, text: str) -> dict[str, Any]:
    """The score of an answer; None and the reason where the scorer cannot take it, so that the answer is kept."""
    try:
        return {"score": task.score(example, text)}
    except UNSCORABLE as error:
        return {"score": None, "unscored": f"{type(error).__name__}: {error}"}


def summarise(folder: RunFolder, tasks: Sequence[Task]) -> dict[str, Any]:
    """metrics.json: score with standard error of every task and length, means over tasks per length."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in folder.done.values():
        groups.setdefault((row["task"], row["length"]), []).append(row)
    results = []
    for task in tasks:
        rows = groups.get((task.name, task.length), [])
        if any(row["score"] is not None for row in rows):
            facts = {"task": task.name, "length": task.length, "metric": task.metric}
            results.append({**facts, **_statistics(rows), "ran": what_ran(rows)})
    lengths = sorted({result["length"] for result in results})
    means = {}
    for length in lengths:
        scores = [result["score"] for result in results if result["length"] == length]
        names = [result["task"] for result in results if result["length"] == length]
        means[str(length)] = {"score": round(sum(scores) / len(scores), 2), "tasks": len(scores), "names": names}
    return {"results": results, "mean_by_length": means}


def what_ran(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct facts of the rows (method, budgets, dense layers, fallbacks), each with its number of rows.

    Facts that differ in numbers only are one entry with ranges: budgets may follow the prompt's length.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        facts = _flat(row.get("ran", {}))
        words = {name: value for name, value in facts.items() if not _is_number(value)}
        groups.setdefault(json.dumps(words, sort_keys=True), []).append(facts)
    result = []
    for members in groups.values():
        merged = {name: _range([one[name] for one in members if name in one]) for name in members[0]}
        result.append({**merged, "samples": len(members)})
    return result


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range(values: Sequence[Any]) -> Any:
    if not _is_number(values[0]) or min(values) == max(values):
        return values[0]
    return f"{min(values)}–{max(values)}"


def _statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row["score"] is not None]
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    return {
        "score": round(100 * mean, 2),
        "standard_error": round(100 * math.sqrt(variance / len(scores)), 2),
        "samples": len(scores),
        "unscored": len(rows) - len(scores),
        "empty_predictions": sum(not row["pred"].strip() for row in rows),
    }

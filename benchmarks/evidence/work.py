"""Workers: units claimed one after the other, batches run, every batch's rows written at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.samples import Sample, read_samples
from benchmarks.evidence.units import Unit, Wanted, units


@dataclass(frozen=True)
class Run:
    """What a worker is told."""

    samples: Path
    model: Path
    out: Path
    heads: Path
    dtype: str | None
    wanted: tuple[Wanted, ...]
    count: int | None
    receipt_count: int
    batch_tokens: int
    head_steps: int
    head_hidden: int
    stop: tuple[int, ...]
    opening: int
    deadline: float
    claims: Path

    def units(self) -> Iterator[Unit]:
        yield from units(self.wanted, self.opening)


def start(run: Run, workers: int) -> int:
    """Run all workers; the number of those that failed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(run, index)) for index in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(process.exitcode != 0 for process in processes)


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    """All whole rows of all workers, also of earlier runs."""
    for file in sorted(out.glob("rows-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # a line torn by a kill is run again
                print(f"{file}: a torn line is left out", flush=True)


def chosen(unit: Unit, samples: list[Sample], run: Run) -> list[Sample]:
    """The samples of a unit, tasks taking turns so that all batches are alike."""
    if unit.kind == "text":
        return [s for s in samples if s.kind == "text"][: run.count]
    found = [s for s in samples if (s.kind, s.length) == (unit.kind, unit.length)]
    turns: dict[str, int] = {}
    keyed = []
    for sample in found:
        turns[sample.task] = turns.get(sample.task, -1) + 1
        keyed.append((turns[sample.task], sample.task, sample))
    keyed.sort(key=lambda item: item[:2])
    limits = [n for n in (run.count, run.receipt_count if unit.section in ("receipts", "sweep") else None) if n]
    return [sample for turn, _, sample in keyed if turn < min(limits, default=1 << 30) or unit.kind == "needle"]


def worker(run: Run, index: int) -> None:
    """Claim units until none is left or the time is up."""
    from apb_jax.compile_cache import use_compile_cache
    from benchmarks.evidence.measure import Engines

    use_compile_cache()
    samples, _ = read_samples(run.samples)
    done = {(row["unit"], row["key"]) for row in rows_of(run.out)}
    engines = Engines(run.model, run.heads, run.dtype)
    with (run.out / f"rows-{index}.jsonl").open("a", encoding="utf-8") as file:
        for number, unit in enumerate(run.units()):
            if time.time() > run.deadline:
                print(f"[{index}] the time is up before {unit.name}", flush=True)
                return
            try:
                os.close(os.open(run.claims / str(number), os.O_CREAT | os.O_EXCL))
            except FileExistsError:  # another worker has it
                continue
            if unit.needs_heads and not run.heads.exists():
                print(f"[{index}] {unit.name}: no retaining heads at {run.heads}", flush=True)
                continue
            try:
                if unit.kind == "heads":
                    _heads(run, engines, samples)
                else:
                    _unit(run, unit, engines, samples, done, file, index)
            except Exception:  # noqa: BLE001 - told in full; a unit that fails must not take the others' time
                print(f"[{index}] {unit.name} FAILED\n{traceback.format_exc(limit=4)}"[-2500:], flush=True)


def _unit(run: Run, unit: Unit, engines: Any, samples: list[Sample], done: Any, file: Any, index: int) -> None:
    todo = [s for s in chosen(unit, samples, run) if (unit.name, s.key) not in done]
    if not todo:
        return
    tokens = run.batch_tokens // 2 if unit.section == "receipts" else run.batch_tokens  # two sets of logits
    size = max(1, min(tokens // unit.length, len(todo)))
    engine, started, compiled = engines.of(unit), time.time(), 0.0
    finished = 0
    for first in range(0, len(todo), size):
        if time.time() > run.deadline:
            break
        own = todo[first : first + size]
        batch = [*own, *todo[: size - len(own)]]  # the last batch is filled up: one shape, one program
        found, ran = _measured(run, unit, engines, batch)
        file.write(json.dumps({"unit": unit.name, "key": "", "ran": ran}, separators=(",", ":")) + "\n")
        for sample, row in zip(own, found[: len(own)], strict=True):
            file.write(json.dumps({"unit": unit.name, "key": sample.key, **row}, separators=(",", ":")) + "\n")
        file.flush()
        finished += len(own)
        compiled = engine.programs.compile_s
        if first == 0:
            print(f"[{index}] {unit.name}: first batch of {size} in {time.time() - started:.1f} s", flush=True)
    print(
        f"[{index}] {unit.name}: {finished} of {len(todo)} samples, {time.time() - started:.1f} s "
        f"({compiled:.0f} s of compiling so far)",
        flush=True,
    )


def _measured(run: Run, unit: Unit, engines: Any, batch: list[Sample]) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each sample, the methods that really ran); requests of one method go together."""
    from apb_jax.batching import groups
    from benchmarks.evidence import measure

    engine, found, ran = engines.of(unit), {}, []
    for group in groups(engine, [measure.prompt_of(sample, unit.length) for sample in batch]):
        part = [batch[place] for place in group.places]
        if unit.kind == "text":
            rows, what = measure.likelihood(engine, part, unit.length)
        elif unit.section == "receipts":
            reference = engines.of(Unit(unit.section, "full", unit.length))
            rows, what = measure.receipts(engine, reference, part, unit.length, run.stop)
        else:
            rows, what = measure.answers(engine, part, unit.length, run.stop)
        found |= dict(zip(group.places, rows, strict=True))
        ran.append(what)
    return [found[place] for place in range(len(batch))], ran


def _heads(run: Run, engines: Any, samples: list[Sample]) -> None:
    from benchmarks.evidence.heads import train_heads

    train_heads(
        engines.base(False, "", 0).model, [s for s in samples if s.kind == "heads"], run.head_hidden, run.head_steps,
        run.heads,
    )  # fmt: skip


def claims_folder() -> Path:
    """Outside the output, which has few files."""
    return Path(tempfile.mkdtemp(prefix="claims"))

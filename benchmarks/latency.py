"""MInference's latency table: prefill seconds over lengths and methods, without a cache, on one device.

    python benchmarks/latency.py --out OUT                       # 1K ... 1000K, five methods, at most 250 s
    python benchmarks/latency.py --model tiny --lengths 1k,4k --methods full,streaming

Timed are all layers over the document's rows (random ids, random weights); embedding and head are left out,
compilation is apart. Cells run from short to long, the longest of ``--early`` before all. A cell that is predicted to
take longer than ``--cell-s`` (from the same method's shorter cells; from FLOPs where it has none) runs for a few layers
only: its row says how many, ``prefill_s`` stays empty and ``predicted_s`` is their time a layer times the layers. A
cell that the plan refuses, that dies, or that no time was left for has its ``reason``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from concurrent.futures import wait
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from apb_jax.arguments import lengths as parse_lengths
from apb_jax.command import Parser, command

LENGTHS = (1000, 10_000, 50_000, 100_000, 128_000, 200_000, 300_000, 500_000, 1_000_000)
METHODS = ("full", "streaming", "minference", "infllm", "apb")
LAYER_BY_LAYER = 50_000
"""From this length on a program is one layer: it can be stopped early, and a launch costs nothing beside a layer."""
SAMPLE_S = 2.0
"""A cell that is not run whole stops after this time, or after one layer."""


@dataclasses.dataclass
class Table:
    """Rows so far, by method and length."""

    rows: dict[tuple[str, int], dict[str, Any]] = dataclasses.field(default_factory=dict)

    def predicted(self, method: str, length: int, floor: float) -> float:
        """Seconds: along the last two measured lengths of the method on logarithmic scales; else ``floor``."""
        from apb_jax.measure.auto import Calibration, Measurement

        known = [
            Measurement(m, 1, n, row.get("prefill_s") or row["predicted_s"])
            for (m, n), row in self.rows.items()
            if m == method and (row.get("prefill_s") or row.get("predicted_s"))
        ]
        shorter = [row for row in known if 10_000 <= row.tokens < length]
        return Calibration("", tuple(shorter)).predict(method, 1, length) or floor if shorter else floor

    def text(self, lengths: tuple[int, ...], methods: tuple[str, ...]) -> str:
        """Markdown: seconds, or about so many (after ~) where only some layers ran, or a letter of the reasons."""
        lines = ["| | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
        reasons: dict[str, None] = {}
        for length in lengths:
            cells = []
            for method in methods:
                row = self.rows.get((method, length), {"reason": "not reached"})
                if row.get("prefill_s"):
                    cells.append(f"{row['prefill_s']:.3f} s")
                elif row.get("predicted_s"):
                    cells.append(f"~{row['predicted_s']:.3g} s ({row['layers_run']} of {row['layers']} layers)")
                else:
                    reasons.setdefault(row["reason"])
                    cells.append(f"({list(reasons).index(row['reason']) + 1})")
            lines.append(f"| {length // 1000}K | " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", *(f"({i}) {reason}" for i, reason in enumerate(reasons, 1))])


def run_cell(cell: Any, expected_s: float, limit_s: float, layers: int) -> dict[str, Any]:
    """Seconds of all layers, or of a few where they would take longer than ``limit_s``."""
    if cell.row_count < LAYER_BY_LAYER:  # short: once to warm up
        for _ in cell.layers():
            pass
    done, first, seconds = 0, 0.0, 0.0
    for done, seconds, _ in cell.layers():
        first = first or seconds
        per_layer = (seconds - first) / (done - cell.size) if done > cell.size else seconds / done
        if done < layers and max(expected_s, per_layer * layers) > limit_s and seconds > SAMPLE_S:
            break
    if done == layers:
        return {"prefill_s": seconds}
    reason = f"about {per_layer * layers:.3g} s, more than the {limit_s:.0f} s of a cell: {done} of {layers} layers ran"
    return {
        "prefill_s": None,
        "predicted_s": per_layer * layers,
        "layers_run": done,
        "sampled_s": seconds,
        "reason": reason,
    }


@command("python benchmarks/latency.py")
def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--lengths", type=parse_lengths, default=LENGTHS)
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=METHODS)
    parser.add_argument("--early", default="apb", help="the method whose longest cell runs first, whole")
    parser.add_argument("--cell-s", type=float, default=12.0, help="a cell predicted above it runs a few layers only")
    parser.add_argument("--limit-s", type=float, default=250.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    from apb_jax.mesh import has_accelerator, reserve_memory, simulate_devices

    reserve_memory() if has_accelerator() else simulate_devices(1)
    import jax

    import apb_jax
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.kv_memory import NOWHERE
    from apb_jax.measure.devices import figures_of, memory_limit
    from apb_jax.measure.memory import Case, memory_of
    from apb_jax.measure.plan import gib
    from apb_jax.measure.prefill_alone import PrefillAlone, widened
    from apb_jax.measure.seconds import from_flops
    from apb_jax.report import versions
    from apb_jax.task import RANDOM_QUERY_TOKENS

    use_compile_cache()
    device = jax.devices()[0]
    lengths = tuple(sorted(args.lengths))
    model = widened(apb_jax.load(args.model, weights="random"), max(lengths) + RANDOM_QUERY_TOKENS)
    layers, rng = model.config.num_layers, np.random.default_rng(0)
    print(f"{args.model}, random weights, {model.dtype.name}; {device.device_kind}; {versions()}", flush=True)
    first = apb_jax.Engine(model, "full", apb_jax.make_mesh(1))
    jax.block_until_ready(first.state)
    print(f"{time.perf_counter() - started:6.1f} s  weights are there", flush=True)
    table, limit, figures = Table(), memory_limit([device]), figures_of(device.device_kind)
    early = [(args.early, lengths[-1])] if args.early in args.methods else []
    waves = [early] * bool(early) + [[(m, n) for m in args.methods if (m, n) not in early] for n in lengths]

    def left() -> float:
        return args.limit_s - (time.perf_counter() - started)

    def prepare(method: str, length: int) -> tuple[Any, float, dict[str, Any]]:
        spec = apb_jax.MethodSpec(method)
        engine = first.with_method(spec, shards=spec.shards_on(1))
        prompt = engine.prompt(*(rng.integers(0, model.config.vocab_size, n) for n in (length, RANDOM_QUERY_TOKENS)))
        case = dataclasses.replace(Case.of(engine), kv_memory=NOWHERE)
        chosen, layout = case.chosen([prompt])
        bytes_ = memory_of(case, chosen, layout).bytes_per_device
        row = {
            "planned_bytes": bytes_,
            "ran": chosen.name,
            "shards": engine.shards,
            "fields": dataclasses.asdict(chosen),
        }
        if limit is not None and bytes_ > limit:
            raise apb_jax.UserError(f"the plan needs {gib(bytes_)} without a cache, and {gib(limit)} are there")
        cell = PrefillAlone.of(engine, prompt, 1 if length >= LAYER_BY_LAYER else max(1, layers // 8))
        floor = 0.0 if figures is None else from_flops(case, chosen, layout, figures).seconds
        cell.compile_ahead()
        return cell, floor, row | {"rows": cell.row_count}

    def guarded(key: tuple[str, int], work: Any) -> Any:
        """A cell that fails says why; the others go on."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - a table of many cells goes on
            put(key, {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            return None

    def put(key: tuple[str, int], row: dict[str, Any]) -> None:
        table.rows[key] = row
        whole = {
            "benchmark": "latency", "date": date.today().isoformat(), "device": device.device_kind, "model": args.model,
            "method": key[0], "length": key[1], "layers": layers, "versions": versions(), **row,
        }  # fmt: skip
        row["layers"] = layers
        shown = row.get("prefill_s") or row.get("reason")
        print(f"{time.perf_counter() - started:6.1f} s  {key[0]:<11} {key[1]:>9}  {shown}", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "latency.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")

    for number, wave in enumerate(waves):
        if left() < 10:
            for key in wave:
                put(key, {"reason": f"the run's {args.limit_s:.0f} s were over"})
            continue
        ready = {key: guarded(key, lambda key=key: prepare(*key)) for key in wave}
        wait(first.programs.begun.values())  # XLA times its choices on the device: nothing may run beside
        for key, prepared in ready.items():
            if prepared is None:
                continue
            cell, floor, row = prepared
            expected = table.predicted(*key, floor)
            allowed = min(left() - 5, 0.6 * args.limit_s if early and not number else args.cell_s)
            if left() - 5 < SAMPLE_S:
                put(key, row | {"reason": f"the run's {args.limit_s:.0f} s were over"})
                continue
            found = guarded(key, lambda c=cell, e=expected, a=allowed: run_cell(c, e, a, layers))
            if found is not None:
                put(key, row | found)
            del cell, prepared
            ready[key] = None
    text = table.text(lengths, args.methods)
    print(text, flush=True)
    if args.out:
        (args.out / "latency.md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

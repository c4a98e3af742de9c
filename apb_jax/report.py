"""What a run leaves behind: its JSON object, the closing table, receipts in words, a Markdown page."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path
from typing import Any

from apb_jax.engine import Engine
from apb_jax.files import write_json, write_text
from apb_jax.generation import Answer
from apb_jax.measure.plan import planned_bytes
from apb_jax.precision import Precision
from apb_jax.session import Session


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def versions() -> dict[str, str]:
    """Of what decides numbers and speed."""
    import flax
    import jax
    import jaxlib
    import numpy

    from apb_jax import __version__

    return {
        "apb_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The closing table's rows from a run's JSON object."""
    decode, measured = result["decode_ms_per_token"], result["memory_source"] == "measured peak"
    return [
        ("document", f"{result['document_tokens']:,} tokens"),
        ("prefill", f"{result['prefill_s']:.3f} s"),
        ("prefill speed", f"{result['prefill_tokens_per_s']:,.0f} tok/s"),
        ("first token, after the prefill", f"{result['query_s']:.3f} s"),
        ("decode", "-" if decode is None else f"{decode:.2f} ms/token"),
        (f"memory per device, {result['memory_source']}", size(result["peak_bytes_per_device"])),
        *([("moved per layer and shard", size(result["bytes_per_layer"]))] if "bytes_per_layer" in result else []),
        *(recovered(result) if "recovered_mass" in result else []),
        *([("memory per device, planned", size(result["planned_bytes_per_device"]))] if measured else []),
        ("compile, not counted above", f"{result['compile_s']:.1f} s"),
    ]


def recovered(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How much of full attention's mass the sampled rows saw, and which layers are dense by the method's settings."""
    share, layers = result["recovered_mass"], result["dense_layers"]
    return [
        ("attention mass recovered", f"{share['mean']:.1%}" if share else "not defined"),
        ("  in the lowest layer", f"{min(share['by_layer']):.1%}" if share else "not defined"),
        ("layers with dense prefill", f"{len(layers)} of {result['layers']}"),
    ]


def closing_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): a column per method, the first one's first."""
    columns = [result, *result.get("compare", [])]
    cells = [figures(column) for column in columns]
    rows = [(row[0][0], *(value for _, value in row)) for row in zip(*cells, strict=True)]
    if len(columns) > 1 and result["correct"] is not None:
        rows.append(("needle", *("found" if column["correct"] else "missed" for column in columns)))
    labels = [column["method"] + at(column, result) for column in columns]
    return ("", *labels), rows


def at(column: dict[str, Any], first: dict[str, Any]) -> str:
    """A column's precision where it is not the first one's: "@bf16"."""
    own, other = column["precision"], first["precision"]
    return "" if own == other else f"@{Precision(**own).word}"


def label(method: str, precision: Precision, first: Engine) -> str:
    """The name of a method run beside ``first``."""
    return method if precision == first.settings.precision else f"{method}@{precision.word}"


def receipts(result: dict[str, Any]) -> list[str]:
    """A sentence per method that was run beside: what the first one changed, and what it gained."""
    return [
        f"receipt against {other['method']}{at(other, result)}: prefill {other['speedup']:.2f}x as fast, greedy "
        f"agreement {other['receipt']['greedy_agreement']:.0%}, top-1 agreement "
        f"{other['receipt']['top1_agreement']:.0%} over {other['receipt']['rows']} query and answer positions, KL mean "
        f"{other['receipt']['kl_mean']:.2g} max {other['receipt']['kl_max']:.2g} nats"
        for other in result.get("compare", [])
    ]


def markdown(result: dict[str, Any]) -> str:
    """The run as a Markdown page: what ran, the closing table, the receipts, prediction and truth."""
    header, rows = closing_table(result)
    options = ", ".join(f"{name}={value}" for name, value in result["method_options"].items()) or "no options"
    mesh = " x ".join(f"{axis}={count}" for axis, count in result["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    held = ", ".join(filter(None, (result["dtype"], str(Precision(**result["precision"])))))
    cut = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    lines = [
        f"# {result['model']}: {result['method']} on {result['document_tokens']:,} tokens",
        "",
        f"{result['method']} ({options}); weights {result['weights']}, {held}, kernels {result['kernels']}, "
        f"template {result['template']}; "
        f"{result['device']}, mesh {mesh}, {result['shards']} shards; {versions}.",
        "",
        cut(header),
        "|" + "---|" * len(header),
        *map(cut, rows),
        *(line for sentence in receipts(result) for line in ("", sentence)),
        "",
        *([f"Ground truth: {result['ground_truth']}", ""] if result["ground_truth"] is not None else []),
        f"Prediction: {result['prediction']}",
    ]
    return "\n".join(lines) + "\n"


def first_number(text: str) -> str | None:
    """The first run of digits: what a needle's answer is judged by."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def describe(session: Session, answer: Answer, truth: str | None, *, alone: bool = True) -> dict[str, Any]:
    """One method's part of the JSON object: what ran, on what, what came out, what it cost.

    ``alone``: no other method ran in this process, so that the devices' own peak is this one's.
    """
    import jax

    engine = session.engine
    peak, source = peak_bytes(engine, measured=alone)
    device = jax.devices()[0]
    settings = engine.settings
    return {
        "prediction": answer.text.strip() if engine.codec else " ".join(map(str, answer.tokens)),
        "ground_truth": truth,
        "correct": None if truth is None else first_number(answer.text) == truth,
        "finish_reason": answer.finish_reason,
        "method": answer.method.name,
        "method_options": dataclasses.asdict(answer.method),
        "layers": engine.model.config.num_layers,
        "dense_layers": list(answer.method.dense_layers_of(engine.model.config)),
        "dtype": engine.model.dtype.name,
        "precision": dataclasses.asdict(settings.precision),
        "kv_memory": settings.kv_memory,
        "kv_layers_that_stay": settings.kv_layers,
        "kernels": settings.kernels.attention or "auto",
        "implementations": {op: sorted(names) for op, names in sorted(engine.programs.choices.items())},
        "slice_decode": settings.slice_decode,
        "template": engine.template,
        "mesh": dict(engine.mesh.shape),
        "shards": engine.shards,
        "device": f"{device.device_kind} ({device.platform})",
        "document_tokens": answer.document_tokens,
        "query_tokens": answer.query_tokens,
        "new_tokens": len(answer.tokens),
        "tokens": answer.tokens,
        "prefill_s": answer.prefill_s,
        "prefill_tokens_per_s": answer.prefill_tokens_per_s,
        "query_s": answer.query_s,
        "decode_s": answer.decode_s,
        "decode_steps": answer.decode_steps,
        "decode_ms_per_token": answer.decode_ms_per_token,
        "compile_s": answer.compile_s,
        "peak_bytes_per_device": peak,
        "memory_source": source,
        "planned_bytes_per_device": planned_bytes(session, len(answer.tokens)),
        "notes": list(answer.notes),
        "versions": versions(),
    }


def peak_bytes(engine: Engine, measured: bool = True) -> tuple[int, str]:
    """Peak bytes on the fullest device, and where the number comes from.

    The devices only know the highest of all that ran in the process: where several methods run, ``measured`` is false.
    """
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()] if measured else []
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "measured peak"
    return engine.programs.largest, "compiler's estimate"


def save(folder: Path, result: dict[str, Any]) -> None:
    """``run.json`` and ``run.md``: what the screen shows, to keep and to compare; each appears whole or not at all."""
    write_json(folder / "run.json", result)
    write_text(folder / "run.md", markdown(result))

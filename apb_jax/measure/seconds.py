"""Seconds that a prefill is expected to take: as measured here where it was, else FLOPs over a device's ceilings."""

from __future__ import annotations

from dataclasses import dataclass

from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.measure.auto import Calibration
from apb_jax.measure.devices import DeviceFigures
from apb_jax.measure.memory import Case


@dataclass(frozen=True)
class Expected:
    """Prefill seconds, and what they rest on."""

    seconds: float
    basis: str


def shard_pairs(method: AttentionMethod, layout: Layout, shard: int) -> float:
    """Query-key pairs of one shard per query head; of a method that selects: those it selects among."""
    keys = method.visible_keys(layout, shard)
    block = int(layout.block_rows[0])
    before = sum(count for kind, count in keys.items() if kind != "block")
    prefix = sum(rows * keys.get(name, rows) / 2 for name, rows in layout.segments[:-1])
    return block * before + block**2 / 2 + prefix


def busiest_pairs(case: Case, method: AttentionMethod, layout: Layout) -> float:
    """Pairs of the busiest device; exact methods share them evenly unless they gather."""
    table = case.placement.table
    loads = [sum(shard_pairs(method, layout, int(shard)) for shard in shards) for shards in table]
    return sum(loads) / len(loads) if method.can.exact and not method.can.gathers else max(loads)


def prefill_flops(case: Case, method: AttentionMethod, layout: Layout) -> tuple[float, float]:
    """(products with weights, attention) of the busiest device, all layers, all requests."""
    config, batch = case.config, layout.tokens.shape[0]
    rows = batch * case.placement.local * layout.tokens.shape[2]
    linear = 2.0 * rows * config.layer_parameters * config.num_layers / case.tp
    width = config.num_heads * config.head_dim / case.tp
    return linear, 4.0 * width * busiest_pairs(case, method, layout) * config.num_layers * batch


def from_flops(case: Case, method: AttentionMethod, layout: Layout, figures: DeviceFigures) -> Expected:
    """A lower bound where every pair is computed: nothing of the exchange, and no launch, is counted."""
    linear, attention = prefill_flops(case, method, layout)
    seconds = linear / (figures.matmul_tflops * 1e12) + attention / (figures.attention_tflops * 1e12)
    basis = f"FLOPs over the ceilings measured on {figures.device_kind}"
    if method.can.selects:
        basis += f", as if {method.name} computed all keys that it selects among"
    return Expected(seconds, basis)


def expected(
    case: Case, method: AttentionMethod, layout: Layout, figures: DeviceFigures | None, calibration: Calibration | None
) -> Expected | None:
    """By the calibration where it has the method on so many devices, else by FLOPs; None without figures."""
    if calibration is not None and case.tp == 1:
        tokens = int(layout.document_tokens.max())
        seconds = calibration.predict(method.name, case.devices, tokens)
        if seconds is not None:
            return Expected(seconds, f"python -m apb_jax.calibrate on {calibration.device}")
    return None if figures is None else from_flops(case, method, layout, figures)

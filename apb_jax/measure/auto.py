"""``--method auto``: which method on how many devices, from prefill times measured on this machine.

The measurements are those of ``python -m apb_jax.calibrate``; without them there is no decision, only the command to
run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from apb_jax.attention.method import Setup
from apb_jax.attention.registry import METHODS
from apb_jax.compile_cache import cache_folder
from apb_jax.errors import UserError
from apb_jax.files import read_json, write_json
from apb_jax.model.config import ModelConfig
from apb_jax.typed import check_types

Longest = Callable[[str, int], int]
"""(method, devices) -> document tokens of the longest request that fits there."""
GAIN = 1.25
"""How many times faster an approximate method must be before it is taken instead of an exact one."""


@dataclass(frozen=True)
class Measurement:
    """Median prefill time of a method on ``devices`` devices for documents of ``tokens`` tokens."""

    method: str
    devices: int
    tokens: int
    prefill_s: float

    def __post_init__(self) -> None:
        check_types(self)
        if self.method not in METHODS:
            raise UserError(f"a measurement is of method {self.method!r}; there are: {', '.join(METHODS)}")
        for name in ("devices", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"a measurement has {name} {getattr(self, name)}; it must be at least 1")
        if not 0 < self.prefill_s < math.inf:
            raise UserError(f"a measurement of {self.method} took {self.prefill_s!r} s; it must be above 0")


@dataclass(frozen=True)
class Decision:
    """What to run and why, in a sentence for the user."""

    method: str
    devices: int
    reason: str


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model's shapes on one kind of machine."""

    device: str
    rows: tuple[Measurement, ...]

    def __post_init__(self) -> None:
        keys = [(row.method, row.devices, row.tokens) for row in self.rows]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError("measurements name {} on {} devices at {} tokens twice".format(*twice))

    def predict(self, method: str, devices: int, tokens: int) -> float | None:
        """Seconds for ``tokens``: linear between measured lengths on logarithmic scales, continued at both ends.

        None where the method was not measured on so many devices. From one measurement alone: proportional.
        """
        points = sorted((r.tokens, r.prefill_s) for r in self.rows if (r.method, r.devices) == (method, devices))
        if not points:
            return None
        if len(points) == 1:
            return points[0][1] * tokens / points[0][0]
        after = next((i for i, (length, _) in enumerate(points) if length >= tokens), len(points) - 1)
        (n0, t0), (n1, t1) = points[max(0, after - 1)], points[max(1, after)]
        slope = (math.log(t1) - math.log(t0)) / (math.log(n1) - math.log(n0))
        return math.exp(math.log(t0) + slope * (math.log(tokens) - math.log(n0)))

    def candidates(self) -> list[tuple[str, int]]:
        """(method, devices) that were measured, in the order of measuring."""
        return list(dict.fromkeys((r.method, r.devices) for r in self.rows))


def decide(
    tokens: int,
    devices: int,
    config: ModelConfig,
    calibration: Calibration,
    *,
    approximate: bool = True,
    longest: Longest | None = None,
) -> Decision:
    """The fastest exact method on up to ``devices`` devices, or an approximate one that is GAIN times faster still.

    ``approximate=False`` leaves only the exact ones. Methods that cannot serve the model on their devices, or hold at
    most ``longest(method, devices)`` tokens there, fewer than these, are left out.
    """
    times: dict[tuple[str, int], float] = {}
    short: dict[tuple[str, int], int] = {}
    for method, count in calibration.candidates():
        seconds = calibration.predict(method, count, tokens)
        # What was measured had the heads that it needs.
        setup = Setup(config, model="", shards=count, devices=count, has_heads=True)
        if count <= devices and seconds is not None and METHODS[method].refuse(setup, {}) is None:
            room = tokens if longest is None else longest(method, count)
            if room < tokens:
                short[method, count] = room
            else:
                times[method, count] = seconds
    left = ", ".join(f"{_said(key)} (at most {room:,})" for key, room in short.items())
    found = _fastest(tokens, devices, times, approximate, left)
    if longest is None:
        return found
    reason = found.reason + (f"; left out, {tokens} tokens do not fit: {left}" if short else "")
    reason += f"; the longest document that fits so has {longest(found.method, found.devices):,} tokens"
    return Decision(found.method, found.devices, reason)


def _fastest(tokens: int, devices: int, times: dict[tuple[str, int], float], approximate: bool, left: str) -> Decision:
    """The choice among methods that fit; ``left``: those that do not, in words."""
    exact = {key: s for key, s in times.items() if METHODS[key[0]].can.exact}
    if not exact and left:
        usable = times if approximate else {}
        if not usable:
            raise UserError(f"{tokens} tokens fit under no method that was measured here: {left}; give more devices")
        best = min(usable, key=usable.__getitem__)
        said = (
            f"{tokens} tokens: {_said(best)} about {usable[best]:.3g} s; no exact method that was measured holds them"
        )
        return Decision(*best, said)
    if not exact:
        raise UserError(
            f"no exact method was measured on {devices} or fewer devices here; "
            f"run python -m apb_jax.calibrate --sp {devices}"
        )
    best = min(exact, key=lambda key: (exact[key], key[1]))
    reason = f"{tokens} tokens on {best[1]} of {devices} devices: {_said(best)} about {exact[best]:.3g} s"
    rivals = sorted((key for key in exact if key != best), key=exact.__getitem__)
    if rivals:
        reason += f", {_said(rivals[0])} {exact[rivals[0]]:.3g} s"
    others = {key: s for key, s in times.items() if key not in exact} if approximate else {}
    if others:
        fastest = min(others, key=others.__getitem__)
        gain = exact[best] / others[fastest]
        if gain >= GAIN:
            reason = f"{tokens} tokens: {_said(fastest)} about {others[fastest]:.3g} s, {gain:.1f} times faster than "
            return Decision(*fastest, reason + f"the fastest exact method ({_said(best)}, {exact[best]:.3g} s)")
        reason += (
            f"; {_said(fastest)} would be {gain:.2f} times as fast, less than the {GAIN} that approximation must give"
        )
    return Decision(*best, reason)


def _said(key: tuple[str, int]) -> str:
    return f"{key[0]} on {key[1]} device{'s' if key[1] > 1 else ''}"


def calibration_path(config: ModelConfig, dtype: str) -> Path:
    """Where the measurements of these shapes on this kind of device are kept."""
    base = cache_folder()
    if base is None:
        raise UserError("this user has no home directory to keep measurements in; set XDG_CACHE_HOME")
    device = jax.devices()[0].device_kind
    shapes = (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads)
    key = json.dumps([device, jax.__version__, dtype, *shapes, config.head_dim])
    name = f"{device.replace(' ', '-').lower()}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return base / "calibration" / name


def read_calibration(path: Path, model: str) -> Calibration:
    """What ``write_calibration`` stored; UserError with the command to run where there is nothing usable."""
    if not path.is_file():
        raise UserError(
            f"--method auto needs measurements of this machine; run once: python -m apb_jax.calibrate --model {model}"
        )
    try:
        stored = read_json(path, "calibration")
        return Calibration(str(stored["device"]), tuple(Measurement(**row) for row in stored["rows"]))
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a calibration ({error}); delete it and run python -m apb_jax.calibrate"
        ) from error


def write_calibration(path: Path, device: str, rows: Sequence[Measurement]) -> None:
    """Add rows to the file, in one step: a row of the same method, devices and length is replaced, others stay."""
    kept: tuple[Measurement, ...] = read_calibration(path, "").rows if path.is_file() else ()
    found = {(row.method, row.devices, row.tokens): row for row in (*kept, *rows)}
    write_json(path, {"device": device, "rows": [asdict(row) for row in found.values()]})

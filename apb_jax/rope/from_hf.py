"""The rope of an HF ``config.json``: in the old spelling (``rope_theta``, ``rope_scaling``) or ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apb_jax.errors import UserError
from apb_jax.rope.base import Rope
from apb_jax.rope.default import DefaultRope
from apb_jax.rope.linear import LinearRope
from apb_jax.rope.llama3 import Llama3Rope
from apb_jax.rope.yarn import YarnRope

SUPPORTED = "default, linear, llama3, yarn"
DEFAULT_THETA = 10000.0
"""What transformers takes where a configuration names no theta."""

REASONS = {
    "dynamic": "its frequencies follow the length of the request, so that cached keys would have to be rotated anew; "
    "a fixed stretch ('yarn' or 'linear') can be computed",
    "longrope": "it has one factor per dimension and two sets of them",
}
"""Why a known type is not computed."""


def rope_from_hf(hf: Mapping[str, Any], max_positions: int | None = None, default_theta: float = DEFAULT_THETA) -> Rope:
    """The rule that transformers applies for this ``config.json``.

    Args:
        hf: the whole configuration.
        max_positions: the family's positions where ``max_position_embeddings`` is absent or null.
        default_theta: the family's theta where no ``rope_theta`` is given.

    Raises:
        UserError: a type or setting that is not computed, a missing or unreal number, two spellings that disagree.
    """
    spellings = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if hf.get(name) is not None}
    for name, settings in spellings.items():
        if not isinstance(settings, Mapping):
            raise UserError(
                f"config.json has {name}={settings!r}; it must be an object such as {{'rope_type': 'yarn'}}"
            )
    if not any(spellings.values()):
        if "rope_parameters" in spellings and hf.get("rope_theta") is None:
            raise UserError(
                "config.json has an empty rope_parameters and no rope_theta; "
                f"write the theta that the model was trained with (transformers' default: {default_theta:.0f})"
            )
        return _read({}, hf, max_positions, default_theta)
    ropes = {
        name: _read(settings, hf, max_positions, default_theta) for name, settings in spellings.items() if settings
    }
    if len(set(ropes.values())) > 1:
        raise UserError(
            f"config.json has rope_parameters={hf['rope_parameters']!r} and rope_scaling={hf['rope_scaling']!r}, "
            "which disagree; leave one of them out"
        )
    return next(iter(ropes.values()))


def _read(given: Mapping[str, Any], hf: Mapping[str, Any], max_positions: int | None, default_theta: float) -> Rope:
    settings = {name: value for name, value in given.items() if value is not None}
    kinds = {settings.pop(name) for name in ("rope_type", "type") if name in settings} or {"default"}
    kind = sorted(map(str, kinds))[0]
    if len(kinds) > 1:
        raise UserError(f"config.json names two rope types, {sorted(map(str, kinds))}; leave one of them out")
    share = settings.pop("partial_rotary_factor", 1)
    if share != 1:
        raise UserError(f"config.json has partial_rotary_factor={share!r}; supported is 1, the whole head rotated")
    if settings.get("truncate") is True:  # transformers' default
        settings.pop("truncate")

    def number(name: str, default: float | None = None) -> float:
        value = settings.pop(name, default)
        if value is None:
            raise UserError(f"rope type {kind!r} needs the setting {name!r} in config.json")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"config.json has {name}={value!r} for rope type {kind!r}; it must be a finite number")
        return float(value)

    top_theta = hf.get("rope_theta")
    twice = top_theta is not None and "rope_theta" in settings
    theta = number("rope_theta", default_theta if top_theta is None else top_theta)
    if twice and top_theta != theta:
        raise UserError(
            f"config.json has rope_theta={top_theta!r} and, among the rope's settings, {theta!r}, which disagree; "
            "leave one of them out"
        )
    stated = hf.get("max_position_embeddings") or max_positions
    # transformers lets the one beside the settings win.
    original = hf.get("original_max_position_embeddings")
    if original is not None:
        settings["original_max_position_embeddings"] = original
    if kind == "default":
        settings.pop("original_max_position_embeddings", None)
        rope: Rope = DefaultRope(theta)
    elif kind == "linear":
        settings.pop("original_max_position_embeddings", None)
        rope = LinearRope(theta, number("factor"))
    elif kind == "llama3":
        rope = Llama3Rope(
            theta,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_max_positions=int(number("original_max_position_embeddings", stated)),
        )
    elif kind == "yarn":
        positions = int(number("original_max_position_embeddings", stated))
        rope = YarnRope(
            theta,
            factor=number("factor", stated / positions if "factor" in given and stated and positions > 0 else None),
            original_max_positions=positions,
            beta_fast=number("beta_fast", 32) or 32.0,
            beta_slow=number("beta_slow", 1) or 1.0,
            explicit_attention_factor=number("attention_factor") if "attention_factor" in settings else None,
        )
    else:
        reason = f": {REASONS[kind]}" if kind in REASONS else ""
        raise UserError(f"rope type {kind!r} is not supported{reason}; supported: {SUPPORTED}")
    if settings:
        shown = ", ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))
        raise UserError(
            f"unknown settings for rope type {kind!r} in config.json: {shown}; leave them out or use {SUPPORTED}"
        )
    return rope

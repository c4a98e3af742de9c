"""Published FP8 checkpoints: what ``quantization_config`` may say, and the tensors that it adds.

Read as they are: compressed-tensors' FP8-dynamic (``float-quantized``, one scale an output channel, activations by row)
and FBGEMM's (``fbgemm_fp8``). In both a matrix ``NAME.weight`` is F8_E4M3 [out, in] and ``NAME.weight_scale`` [out, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from apb_jax.errors import UserError
from apb_jax.weights.safetensors_header import TensorEntry

KEY = "quantization_config"
COMPRESSED, FBGEMM = "compressed-tensors", "fbgemm_fp8"
SCALE_SUFFIX = ".weight_scale"
BOUND_SUFFIX = ".input_scale_ub"
"""FBGEMM's bound of activation scales, beside which rows here are scaled by their own maximum."""
FP8_DYNAMIC: dict[str, Any] = {
    "quant_method": COMPRESSED,
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True,
                "observer": None,
            },
            "output_activations": None,
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}  # fmt: skip
"""The layout that ``converters quantize`` writes."""
ADVICE = "take an FP8-dynamic checkpoint, or the unquantised one with --weights-dtype fp8"


def is_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of an FP8 checkpoint that can be read as it is; False: it is not quantised.

    Raises:
        UserError: quantised in any other way, with the first key that says so.
    """
    scheme = settings.get(KEY)
    if scheme is None:
        return False
    if not isinstance(scheme, dict) or scheme.get("quant_method") not in (COMPRESSED, FBGEMM):
        method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
        raise UserError(
            f"config.json has {KEY}={_short(scheme)}, which is not computed (quant_method {method!r}); supported: "
            f"weights in bf16, f16 or f32, and FP8 by {COMPRESSED} or {FBGEMM}: take such a checkpoint"
        )
    wrong = next(_faults(scheme), None) if scheme["quant_method"] == COMPRESSED else None
    if wrong is not None:
        name, value, rule = wrong
        raise UserError(f"config.json's {KEY} has {name}={_short(value)}; it must be {rule}: {ADVICE}")
    return True


def _faults(scheme: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, rule) of what FP8-dynamic does not allow."""
    groups = scheme.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        yield "config_groups", groups, "one group for all linear layers"
        return
    if scheme.get("format") not in (None, "float-quantized", "naive-quantized"):
        yield "format", scheme["format"], "'float-quantized'"
    if group.get("targets") != ["Linear"]:
        yield "targets", group.get("targets"), "['Linear']"
    for part, strategy, dynamic in (("weights", "channel", False), ("input_activations", "token", True)):
        found = group.get(part) or {}
        for name, right in (("num_bits", 8), ("type", "float"), ("dynamic", dynamic), ("strategy", strategy)):
            if found.get(name) != right:
                why = " (static activation scales are not computed with)" if name == "dynamic" and dynamic else ""
                yield f"{part}.{name}", found.get(name), f"{right!r}{why}"
        if found.get("symmetric") is False:
            yield f"{part}.symmetric", False, "true"
    if group.get("output_activations") is not None:
        yield "output_activations", group["output_activations"], "null"
    if scheme.get("kv_cache_scheme") is not None:
        yield "kv_cache_scheme", scheme["kv_cache_scheme"], "null"


def flattened(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors with scales [out, 1] seen as [out], as they lie; without FBGEMM's bounds."""
    found = {}
    for name, entry in entries.items():
        if name.endswith(BOUND_SUFFIX):
            continue
        is_column = name.endswith(SCALE_SUFFIX) and len(entry.shape) == 2 and entry.shape[1] == 1
        found[name] = replace(entry, shape=entry.shape[:1]) if is_column else entry
    return found


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."

"""``--method auto`` with a machine in hand: its calibration, and which methods hold the document on its devices."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax

from apb_jax.attention.registry import MethodSpec
from apb_jax.kv_memory import DEVICE
from apb_jax.measure.auto import Decision, calibration_path, decide, read_calibration
from apb_jax.measure.devices import memory_limit
from apb_jax.measure.memory import Case
from apb_jax.measure.plan import longest_document
from apb_jax.precision import FP8, Precision

if TYPE_CHECKING:
    from apb_jax.weights.checkpoint import LoadedModel


def choose(
    model: LoadedModel,
    tokens: int,
    devices: int,
    *,
    tp: int = 1,
    limit: int | None = None,
    precision: Precision = Precision(),  # noqa: B008 - frozen
    kv_memory: str = DEVICE,
) -> Decision:
    """The method for a document of ``tokens`` tokens on up to ``devices`` devices; reads no weight.

    ``limit``: bytes a device; None: what the devices say, and all methods fit where they do not. ``precision`` and
    ``kv_memory``: what a run would be told, for they decide what fits.

    Raises:
        UserError: this machine was not calibrated for the model, or nothing that was measured holds the document.
    """
    calibration = read_calibration(calibration_path(model.config, model.dtype.name), model.name)
    limit = memory_limit(jax.devices()) if limit is None else limit

    @functools.cache
    def longest(method: str, count: int) -> int:
        spec = MethodSpec(method)
        case = Case(
            config=model.config,
            model=model.name,
            itemsize=model.dtype.itemsize,
            method=spec,
            devices=count,
            tp=tp,
            shards=spec.shards_on(count),
            retaining_hidden=model.retaining_hidden,
            folded=model.fold_heads,
            fp8=model.source.fp8 or precision.weights == FP8,
            kv=precision.kv,
            kv_memory=kv_memory,
        )
        return longest_document(case, limit)

    return decide(tokens, devices, model.config, calibration, longest=None if limit is None else longest)

"""``--method auto`` with a machine in hand: its calibration, and which methods hold the document on its devices."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax

from apb_jax.attention.registry import MethodSpec
from apb_jax.measure.auto import Decision, calibration_path, decide, read_calibration
from apb_jax.measure.devices import memory_limit
from apb_jax.measure.memory import NEW_TOKENS, QUERY_TOKENS, Case
from apb_jax.measure.plan import longest_document

if TYPE_CHECKING:
    from apb_jax.weights.checkpoint import LoadedModel


def choose(
    model: LoadedModel,
    tokens: int,
    devices: int,
    *,
    tp: int = 1,
    limit: int | None = None,
    query_tokens: int = QUERY_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> Decision:
    """The method for a document of ``tokens`` tokens on up to ``devices`` devices; reads no weight.

    ``limit``: bytes a device; None: what the devices say, and all methods fit where they do not.

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
            fp8=model.fp8,
        )
        return longest_document(case, limit, query_tokens, new_tokens)

    return decide(tokens, devices, model.config, calibration, longest=None if limit is None else longest)

"""The receipt: what an approximate method changed, measured against another method on the same input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from apb_jax.errors import UserError


@dataclass(frozen=True)
class Receipt:
    """Agreement over the rows of query and answer; the reference's answer is fed to both (teacher forcing)."""

    rows: int
    greedy_agreement: float
    """Share of answer tokens, generated freely, that are the same at the same place."""
    top1_agreement: float
    """Share of rows where both put the same token first."""
    kl_mean: float
    """Mean KL(reference || method) over the rows, nats."""
    kl_max: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def receipt(
    logits: np.ndarray, reference_logits: np.ndarray, tokens: Sequence[int], reference_tokens: Sequence[int]
) -> Receipt:
    """Compare logits [rows, V] of the same rows, and two freely generated answers."""
    if logits.shape != reference_logits.shape:
        raise ValueError(f"logits of {logits.shape} and {reference_logits.shape} are not of the same rows")
    for whose, given in (("the method's", logits), ("the reference's", reference_logits)):
        if not np.isfinite(given).all():
            raise UserError(f"{whose} logits hold NaN or infinity: there is no receipt over them; check the weights")
    ours, theirs = log_softmax(logits), log_softmax(reference_logits)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    longest = max(len(tokens), len(reference_tokens), 1)
    same = sum(a == b for a, b in zip(tokens, reference_tokens, strict=False))
    return Receipt(
        rows=len(kl),
        greedy_agreement=same / longest if tokens or reference_tokens else 1.0,
        top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
    )

"""The receipt and the ratio of a comparison, from logits whose divergence can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apb_jax.measure import compare
from apb_jax.measure.receipt import receipt


def test_divergence_is_of_the_reference_from_the_method() -> None:
    """KL(reference || method) is not symmetric: 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1), in nats."""
    reference, method = np.log(np.float32([[0.5, 0.5], [0.25, 0.75]])), np.log(np.float32([[0.9, 0.1], [0.25, 0.75]]))
    found = receipt(method + 3.0, reference - 5.0, [1, 2, 3, 4], [1, 2, 4, 4])  # a shift of all logits says nothing
    first = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert (found.rows, found.greedy_agreement) == (2, 0.75)
    assert found.kl_max == pytest.approx(first, rel=1e-5)
    assert found.kl_mean == pytest.approx(first / 2, rel=1e-5)


def test_agreement() -> None:
    reference, method = np.float32([[1, 2, 0], [3, 2, 1], [0, 0, 1]]), np.float32([[1, 2, 0], [1, 2, 3], [0, 0, 9]])
    found = receipt(method, reference, [5, 6], [5, 7, 8])
    assert found.top1_agreement == pytest.approx(2 / 3)
    assert found.greedy_agreement == pytest.approx(1 / 3)  # of the longer answer
    with pytest.raises(ValueError, match="not of the same rows"):
        receipt(method, reference[:2], [1], [1])


def test_speed_up_is_the_others_time_over_the_firsts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first method of 2 seconds beside another of 6 is 3 times as fast."""
    logits, given = np.zeros((3, 8)), SimpleNamespace(tokens=[1, 2])
    monkeypatch.setattr(compare, "run_one", lambda engine, asking: ({"prefill_s": engine.prefill_s}, given))
    monkeypatch.setattr(compare, "timed", lambda engine, asking, result: None)
    monkeypatch.setattr(compare, "measured", lambda engine, asking, result, answers: [logits for _ in answers])
    engines: Any = [SimpleNamespace(prefill_s=2.0), SimpleNamespace(prefill_s=6.0)]
    result = compare.beside(engines, None, ({"prefill_s": 2.0}, given))  # type: ignore[arg-type]
    assert result["compare"][0]["speedup"] == 3.0

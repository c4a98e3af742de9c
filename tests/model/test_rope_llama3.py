"""Llama 3.1's rule in all three of its bands: kept, interpolated, divided."""

from __future__ import annotations

import math

import numpy as np
import pytest
from parity_cases import FAMILIES

from apb_jax.model.config import ModelConfig
from apb_jax.rope.llama3 import Llama3Rope

PUBLISHED = Llama3Rope(500000.0, 8.0, 1.0, 4.0, 8192)
"""Llama 3.1's own numbers."""


def by_definition(rope: Llama3Rope, head_dim: int) -> tuple[list[float], list[str]]:
    """Meta's loop over the frequencies, in float64, and the band each falls into."""
    out, bands = [], []
    for i in range(head_dim // 2):
        freq = rope.theta ** (-2 * i / head_dim)
        turns = rope.original_max_positions * freq / (2 * math.pi)  # within the original context
        if turns > rope.high_freq_factor:
            out.append(freq)
            bands.append("kept")
        elif turns < rope.low_freq_factor:
            out.append(freq / rope.factor)
            bands.append("divided")
        else:
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            out.append((1 - smooth) * freq / rope.factor + smooth * freq)
            bands.append("middle")
    return out, bands


@pytest.mark.parametrize(
    ("rope", "head_dim"), [(PUBLISHED, 128), (PUBLISHED, 64), (Llama3Rope(500000.0, 32.0, 1.0, 4.0, 8192), 64)]
)
def test_every_band(rope: Llama3Rope, head_dim: int) -> None:
    want, bands = by_definition(rope, head_dim)
    assert set(bands) == {"kept", "middle", "divided"}
    np.testing.assert_allclose(rope.inv_freq(head_dim), want, rtol=1e-5)
    middle = [i for i, band in enumerate(bands) if band == "middle"]
    base = rope.base_frequencies(head_dim)[middle]
    inside = rope.inv_freq(head_dim)[middle] / base
    assert ((inside > 1 / rope.factor) & (inside < 1)).all()  # neither end of the band stands for its middle


def test_the_case_beside_transformers_has_a_frequency_in_every_band() -> None:
    config = ModelConfig.from_hf(FAMILIES["llama-3.1"])
    assert isinstance(config.rope, Llama3Rope)
    assert set(by_definition(config.rope, config.head_dim)[1]) == {"kept", "middle", "divided"}

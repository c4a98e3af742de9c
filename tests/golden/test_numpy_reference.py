"""The recordings that this repository ships are what the numpy reference computes."""

from __future__ import annotations

import numpy as np
import pytest
from golden.numpy_reference import CASES, inputs, run
from golden.recordings import OWN, Recorded


@pytest.mark.parametrize("name", CASES)
def test_recordings_are_the_references(name: str) -> None:
    for file, table in run(CASES[name], *inputs()).items():
        recorded = Recorded(OWN / name / f"{file}.npz")
        assert set(recorded.arrays) == set(table)
        for key, array in table.items():
            np.testing.assert_allclose(recorded[key], array, rtol=1e-5, atol=1e-5, err_msg=f"{key} of {file}")


def test_a_selection_on_which_rounding_has_no_say() -> None:
    """The last score chosen and the best one left are one maximum of a pooling window, or apart, everywhere."""
    first = CASES["apb_numpy_h4"]["anchor_len"]
    for host in range(CASES["apb_numpy_h4"]["hosts"]):
        found = Recorded(OWN / "apb_numpy_h4" / f"rank{host}.npz")
        for scores, chosen in zip(found["scores_pooled"], found["topk_idx"], strict=True):
            for head in range(scores.shape[1]):
                gap = scores[chosen[:, head], head].min() - np.delete(scores[:, head], chosen[:, head])[first:].max()
                assert gap == 0 or gap > 1e-4, (host, head, gap)

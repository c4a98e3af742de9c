"""Many clients at once, some of which hang up: no error, and nothing is left on the devices."""

from __future__ import annotations

from typing import Any

from benchmarks.serve_load import Load, run_load


def test_a_crowd_leaves_nothing_behind(engine: Any) -> None:
    result = run_load(engine, Load(clients=8, requests=10, documents=3, tokens=384, new_tokens=8, hang_up=0.2))
    assert result["errors"] == []
    assert result["completed"] + result["left"] == 80
    assert result["left"] > 0
    assert result["prefills"] <= 3
    assert result["tasks_left"] == 0
    assert result["device_arrays"]["before"] == result["device_arrays"]["after"]

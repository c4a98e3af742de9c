"""A server that is killed leaves sessions that answer right, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import apb_jax
from benchmarks.session_kill import kill_servers


@pytest.mark.timeout(900)
def test_killed_while_serving(tmp_path: Path) -> None:
    """APB_SERVER_KILLS: how often; each kill comes at a random moment of saving, loading, answering and pruning."""
    engine = apb_jax.Engine(apb_jax.load("tiny", dtype="float32"), "full", apb_jax.make_mesh(sp=1))
    result = kill_servers(engine, tmp_path, int(os.environ.get("APB_SERVER_KILLS", "1")), seed=3)
    assert result["wrong"] == []
    assert result["loaded"]

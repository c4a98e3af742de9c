"""Folded retaining heads in the engine: APB selects, and answers, as with the unfolded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hf_checkpoints import tiny_config, write_checkpoint

import apb_jax


def test_apb_answers_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", tiny_config(num_layers=2), heads=True)
    rng = np.random.default_rng(0)
    document, query = rng.integers(0, 48, 200).tolist(), rng.integers(0, 48, 9).tolist()
    answers = []
    for fold in (False, True):
        engine = apb_jax.Engine(
            apb_jax.load(source, dtype="float32", fold_heads=fold),
            method=apb_jax.APB(anchor_tokens=16, passing_tokens=8),
            mesh=apb_jax.make_mesh(sp=2, tp=2),
        )
        answers.append(engine.generate(document=document, query=query, max_new_tokens=6))
    assert answers[0].tokens == answers[1].tokens

"""What several test folders share: tiny models, folders of recordings, counting collectives."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from apb_jax.measure.traffic import COLLECTIVES, equations
from apb_jax.model.config import ModelConfig
from apb_jax.rope.default import DefaultRope
from apb_jax.weights.checkpoint import LoadedModel, RandomWeights

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("APB_GOLDEN", ROOT.parent / "shared" / "golden"))
DATA = ROOT.parent / "shared" / "data"


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, four query heads, two KV heads of 16: large enough for every code path."""
    base: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope": DefaultRope(10000.0),
        "rms_norm_eps": 1e-5,
        "max_positions": 4096,
    }
    return ModelConfig(**(base | changes))


def random_model(retaining_hidden: int | None = 24, seed: int = 0, **changes: Any) -> LoadedModel:
    """A model of random float32 weights without a tokenizer."""
    return LoadedModel(
        name="random",
        config=tiny_config(**changes),
        dtype=jnp.dtype(jnp.float32),
        retaining_hidden=retaining_hidden,
        source=RandomWeights(seed),
        tokenizer=None,
        folder=None,
    )


def ids(seed: int, count: int, vocabulary: int = 96) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(1, vocabulary, count).tolist()


def count_collectives(jaxpr: Any) -> dict[str, int]:
    """How often each collective stands in a closed jaxpr, inner jaxprs included (the body of a scan once)."""
    names = (
        equation.primitive.name.removesuffix("_invariant").removesuffix("2")
        for equation in equations(jaxpr.jaxpr)
        if not all(isinstance(axis, int) for axis in equation.params.get("axes", ("named",)))  # sums of one device
    )
    return dict(collections.Counter(name for name in names if name in COLLECTIVES))


def told(error: str) -> str:
    """The one line about what was wrong: nothing comes after it, and no traceback before."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert error.rstrip("\n").endswith(lines[0]), error
    assert "Traceback" not in error
    return lines[0]

"""The engine on a GPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/test_gpu_engine.py` (or run this file).

``cpu`` stands beside ``cuda`` because one test computes the same model on both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also where this file is run as a program

from helpers import ids, random_model

import apb_jax
from apb_jax.attention.inputs import Kernels

ON_GPU = jax.default_backend() == "gpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU; JAX's default backend has none"),
]
GROUPS = range(1, 9)
"""Query heads per KV head."""


def bf16_model(group: int) -> apb_jax.LoadedModel:
    """Heads of 64, which the kernels take; ``group`` query heads on each of two KV heads."""
    import dataclasses

    import jax.numpy as jnp

    model = random_model(
        num_heads=2 * group, num_kv_heads=2, head_dim=64, hidden_size=128, intermediate_size=256, vocab_size=512
    )
    return dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("group", GROUPS)
def test_bottom_right_query_equals_the_reference(group: int) -> None:
    """Query and decoding through the GPU's kernels against the dense reference, over shards whose last tile is partial.

    The document's length is prime, so that every shard but one ends inside a tile of keys.
    """
    document, query = ids(1, 1021, 512), ids(2, 9, 512)
    model, mesh = bf16_model(group), apb_jax.make_mesh(1)
    logits = {}
    for name in (None, "reference"):
        engine = apb_jax.Engine(
            model, "apb", mesh, shards=4, bottom_right_query=True, kernels=Kernels(name)
        )  # fmt: skip
        session = engine.prefill([engine.prompt(document, query)])
        logits[name] = session.logits([[5, 6, 7, 8]])[0]
        if name is None:
            took = engine.programs.choices
    assert any(choice != "reference" for choices in took.values() for choice in choices), took
    scale = np.abs(logits["reference"]).max()
    np.testing.assert_allclose(logits[None], logits["reference"], atol=0.03 * scale)


@pytest.mark.parametrize("method", ["full", "apb"])
def test_float32_is_the_cpu_s(method: str) -> None:
    """No product runs in TF32: logits of the whole model, prefill, query and answer, within 2e-5 of the CPU's."""
    document, query = ids(3, 509), ids(4, 9)
    found = {}
    for platform in ("gpu", "cpu"):
        device = jax.devices(platform)[0]
        with jax.default_device(device):
            mesh = apb_jax.make_mesh(1, devices=[device])
            engine = apb_jax.Engine(random_model(), method, mesh, shards=4 if method == "apb" else None)
            session = engine.prefill([engine.prompt(document, query)])
            found[platform] = session.logits([[5, 6, 7, 8]])[0]
    np.testing.assert_allclose(found["gpu"], found["cpu"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("stay", [0, 2])
def test_kv_in_host_memory_is_the_same(stay: int) -> None:
    """The logits of a cache on the device, with and without layers that stay there."""
    document, query = ids(5, 509), ids(6, 9)
    model = random_model(num_layers=5)
    device = apb_jax.Engine(model, "apb", apb_jax.make_mesh(1), shards=4)
    host = device.with_method("apb", kv_memory="host", kv_layers=stay)
    sessions = [engine.prefill([engine.prompt(document, query)]) for engine in (device, host)]
    kinds = [jax.tree.leaves(part)[0].sharding.memory_kind for part in sessions[1].cache.parts]
    assert kinds == ["device"] * stay + ["pinned_host"] * (5 - stay)
    answers = [session.ask(query, 12, stop_ids=(), logits=True) for session in sessions]
    assert answers[0].tokens == answers[1].tokens
    np.testing.assert_allclose(answers[1].step_logits, answers[0].step_logits, atol=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", "gpu", "-p", "no:cacheprovider", "-q"]))

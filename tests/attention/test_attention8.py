"""Attention in 8 bits through the engine: what it changes, which methods refuse it, which GPUs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention.method_cases import method, model
from helpers import ids

import apb_jax
from apb_jax.errors import UserError
from apb_jax.model.config import with_string
from apb_jax.precision import Precision
from pallas_kernels.device import HOPPER, Device, assume

FP8 = Precision(attention="fp8")


def logits(chosen: object, precision: Precision) -> np.ndarray:
    """Of the first step behind a short document."""
    engine = apb_jax.Engine(model(), chosen, apb_jax.make_mesh(sp=2), precision=precision)
    generation = engine.prefill([engine.prompt(ids(1, 96), ids(2, 9))]).start(max_new_tokens=2, logits=True)
    return np.asarray(generation.query_rows)


@pytest.mark.parametrize("name", ["full", "apb"])
def test_logits_move_a_little(name: str) -> None:
    chosen = apb_jax.APB(16, 8) if name == "apb" else method(name)
    plain, rounded = logits(chosen, Precision()), logits(chosen, FP8)
    assert 0 < np.linalg.norm(rounded - plain) < 0.15 * np.linalg.norm(plain)


def test_a_method_whose_attention_is_another_kernel_refuses() -> None:
    """Known beforehand of methods, and under STRING when its program is made."""
    with pytest.raises(UserError, match="xattention attends through block_sparse_attention, which has no 8-bit"):
        apb_jax.Engine(model(), method("xattention"), apb_jax.make_mesh(sp=1), precision=FP8)
    remapped = replace(model(), config=with_string(model().config, 0.33, 16, 300))
    engine = apb_jax.Engine(remapped, method("full"), apb_jax.make_mesh(sp=2), precision=FP8)
    with pytest.raises(UserError, match="--attention-dtype fp8: not all attention"):
        engine.prefill([engine.prompt(ids(1, 96), ids(2, 9))])


def test_a_gpu_before_hopper_refuses() -> None:
    with assume(Device("gpu", "NVIDIA A100", (8, 0))), pytest.raises(UserError, match="--attention-dtype model"):
        apb_jax.Engine(model(), method("full"), apb_jax.make_mesh(sp=1), precision=FP8)


def test_float32_on_hopper_refuses() -> None:
    with assume(HOPPER), pytest.raises(UserError, match="float32"):
        apb_jax.Engine(model(), method("full"), apb_jax.make_mesh(sp=1), precision=FP8)

"""Query and decoding steps on a Hopper GPU: kernels read weights and cache in their stacks, without slicing them."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apb_jax
from apb_jax.programs import Programs
from pallas_kernels.device import HOPPER, assume


@pytest.mark.lowered_only
@pytest.mark.kernel
@pytest.mark.parametrize("shards", [1, 8])
def test_weights_and_cache_are_not_sliced(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a device holds several shards: they stand in the kernel's batch."""
    engine = apb_jax.Engine(apb_jax.load("tiny", dtype="bf16"), "apb", apb_jax.make_mesh(sp=1), shards=shards)
    rng = np.random.default_rng(0)
    session = engine.prefill([engine.prompt(rng.integers(5, 4000, 640), rng.integers(5, 4000, 16))])
    programs: dict[str, Any] = {}

    def lower(self: Programs, name: str, static: Any, make: Any, args: tuple[Any, ...]) -> Any:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        with assume(HOPPER):
            traced = make().trace(*shapes)
            programs[name] = traced.lower(lowering_platforms=("cuda",)).as_text()
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), traced.out_info)

    monkeypatch.setattr(Programs, "call", lower)
    session.start(None, 2, stop_ids=()).step()
    config = engine.model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = f"{session.cache.k.shape[2]}x{config.num_kv_heads}x{config.head_dim}"
    for name in ("query", "decode"):
        sliced = re.findall(r"stablehlo\.dynamic_slice.*-> tensor<1x(\w+)xbf16>", programs[name])
        assert not {f"{hidden}x{inner}", f"{inner}x{hidden}"} & set(sliced), sliced
        assert not any(layer in shape for shape in sliced), sliced
        assert programs[name].count("mosaic_gpu") > 0

"""No copy of a KV stack: what a program is given to write into is written in place, by the compiled program's word."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.attention.registry import MethodSpec

DOCUMENT, QUERY = ids(1, 1000), ids(2, 9)
APB = {"anchor_tokens": 16, "passing_tokens": 8}
CASES = {"full": ("full", {}, 1, None), "apb": ("apb", APB, 2, 8), "ring": ("ring", {}, 2, None)}


def programs(case: str, layers: int) -> tuple[dict[str, Any], int, int]:
    """(memory analysis by program, bytes of the cache on a device, bytes of a layer of it)."""
    method, options, sp, shards = CASES[case]
    model = random_model(num_layers=layers)
    engine = apb_jax.Engine(model, MethodSpec(method, options), apb_jax.make_mesh(sp), shards=shards)
    session = engine.prefill([engine.prompt(DOCUMENT, QUERY)])
    session.ask(QUERY, 3, stop_ids=())
    assert session.method.name == method
    cache = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(session.cache))
    found = {key[0]: program.memory_analysis() for key, program in engine.programs.compiled.items()}
    return found, cache, cache // layers


@pytest.mark.parametrize("case", CASES)
def test_caches_are_written_in_place_and_never_copied(case: str) -> None:
    few, _, _ = programs(case, 4)
    many, cache, layer = programs(case, 8)
    hidden = many["embed"].output_size_in_bytes
    # Hidden rows and the document's KV; a few bytes of an output are its tuple's.
    assert abs(many["prefill"].alias_size_in_bytes - cache - hidden) < 4096
    for name in ("prefill", "query", "decode"):
        assert many[name].output_size_in_bytes - many[name].alias_size_in_bytes < 4096, f"{name} makes a new output"
        grown = many[name].temp_size_in_bytes - few[name].temp_size_in_bytes
        assert grown < layer, f"{name}: with 4 layers more its temporaries grow by {grown}, a layer's KV has {layer}"

"""A kernel asked for by name is that kernel or an error that names the op; every run says what each op took."""

from __future__ import annotations

import pytest
from attention.method_cases import DOCUMENT, QUERY, engine_on, model, string_model

import apb_jax
from apb_jax.attention.inputs import Kernels
from apb_jax.errors import UserError


def test_what_each_op_took_is_known() -> None:
    engine = apb_jax.Engine(model(), "apb", apb_jax.make_mesh(sp=4), kernels=Kernels("reference"))
    engine.generate(DOCUMENT, QUERY, 2, stop_ids=())
    assert engine.programs.choices["flash_attention"] == {"reference"}
    assert engine.programs.choices["decode_attention"] == {"xla"}
    assert engine.programs.choices["select_topk"] == {"xla"}


@pytest.mark.parametrize(("name", "op"), [("minference", "block_sparse_attention"), ("xattention", "block_sparse")])
def test_a_name_is_no_silent_other_kernel(name: str, op: str) -> None:
    engine = engine_on(model(), 1).with_method(name, kernels=Kernels("xla_chunked"))
    with pytest.raises(UserError, match=f"--kernels xla_chunked: .*{op}"):
        engine.prefill([engine.prompt(DOCUMENT, QUERY)])


def test_under_string_kernels_serve_consecutive_rows_alone() -> None:
    """Full attention on one shard takes the kernel by its name; what meets keys of other blocks takes none."""
    engine = engine_on(string_model(40, 8, 1.0), 1).with_method("full", kernels=Kernels("xla_chunked"))
    engine.prefill([engine.prompt(DOCUMENT, QUERY)])
    assert engine.programs.choices["flash_attention"] == {"xla_chunked"}
    engine = engine_on(string_model(40, 8, 1.0), 2).with_method("full", kernels=Kernels("xla_chunked"))
    with pytest.raises(UserError, match="it uses none of the kernels; nearest legal choice: --kernels auto"):
        engine.prefill([engine.prompt(DOCUMENT, QUERY)])

"""APB: exact limits, agreement over shards and devices, what must never be read, and what it costs in collectives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_collectives, ids, random_model

import apb_jax
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout
from apb_jax.errors import UserError
from apb_jax.model.config import with_string

DOCUMENT, QUERY = ids(1, 251), ids(2, 9)  # a prime length: no shard count divides it


@pytest.fixture(scope="module")
def model() -> apb_jax.LoadedModel:
    return random_model()


@functools.cache
def engine_on(model: Any, sp: int, tp: int = 1) -> apb_jax.Engine:
    """One engine a mesh: methods share its weights and the programs that do not depend on them."""
    return apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=sp, tp=tp))


def answer(
    model: Any, method: Any, sp: int, tp: int = 1, document: Any = DOCUMENT, new_tokens: int = 1
) -> apb_jax.Answer:
    engine = engine_on(model, sp, tp).with_method(method)
    return engine.generate(document, QUERY, new_tokens, stop_ids=(), logits=True)


def agree(a: apb_jax.Answer, b: apb_jax.Answer, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(a.query_logits, b.query_logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(a.step_logits, b.step_logits, rtol=0, atol=tolerance)
    assert a.tokens == b.tokens


@pytest.fixture(scope="module")
def truth(model: Any) -> apb_jax.Answer:
    return answer(model, "full", 1)


@pytest.mark.parametrize("sp", [2, 4, 8])
def test_passing_everything_is_full_attention(model: Any, truth: Any, sp: int) -> None:
    """No anchor, every token of every earlier shard passed: APB sees all that full attention sees."""
    block = -(-len(DOCUMENT) // sp)
    agree(answer(model, apb_jax.APB(0, block, query_at=0, embed_query=False), sp), truth)


def test_one_shard_is_full_attention(model: Any, truth: Any) -> None:
    agree(answer(model, apb_jax.APB(64, 32, query_at=3), 1), truth)


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (4, 2), (8, 1)])
def test_full_agrees_on_every_mesh(model: Any, truth: Any, sp: int, tp: int) -> None:
    agree(answer(model, "full", sp, tp), truth)


@pytest.mark.parametrize("scorer", ["heads", "query"])
def test_tensor_parallel_apb_agrees(model: Any, scorer: str) -> None:
    method = apb_jax.APB(24, 16, query_at=3, scorer=scorer)
    agree(answer(model, method, 4, 1), answer(model, method, 4, 2))


def test_passing_matters(model: Any, truth: Any) -> None:
    """Not an exact method: anchor only, and with a passing block, differ from full attention and from each other."""
    only, passed = (answer(model, apb_jax.APB(24, k, query_at=3), 4) for k in (0, 16))
    assert np.abs(only.query_logits - truth.query_logits).max() > 1e-3
    assert np.abs(only.query_logits - passed.query_logits).max() > 1e-3


def test_batch_of_different_lengths_equals_single_requests(model: Any) -> None:
    documents = [ids(3, 251), ids(4, 197), ids(5, 130)]
    engine = engine_on(model, 4).with_method(apb_jax.APB(24, 8, query_at=3))
    together = engine.generate(documents, [QUERY, QUERY[:5], QUERY], 5, stop_ids=(), logits=True)
    for document, query, got in zip(documents, [QUERY, QUERY[:5], QUERY], together, strict=True):
        agree(got, engine.generate(document, query, 5, stop_ids=(), logits=True))


@pytest.mark.parametrize(
    ("sp", "tp", "fields"),
    [
        (2, 1, {}),
        (8, 1, {"anchor_tokens": 13, "passing_tokens": 8}),  # parts of 2 rows, the last ones padding
        (4, 2, {}),
        (4, 1, {"passing_tokens": 0}),
        (4, 1, {"scorer": "query"}),
        (4, 1, {"anchor_tokens": 17, "pool": 9}),  # pooling reaches over two shards' parts
    ],
)
def test_a_shared_anchor_changes_nothing(model: Any, sp: int, tp: int, fields: dict[str, Any]) -> None:
    """Each shard computes a part of the anchor: the same attention with fewer rows, up to rounding."""
    method = apb_jax.APB(**({"anchor_tokens": 24, "passing_tokens": 16, "query_at": 3} | fields))
    shared = dataclasses.replace(method, shared_anchor=True)
    agree(answer(model, shared, sp, tp), answer(model, method, sp, tp), 2e-5)


def test_a_shared_anchor_in_a_batch_and_under_string(model: Any) -> None:
    documents = [ids(3, 251), ids(4, 197)]
    remapped = dataclasses.replace(model, config=with_string(model.config, 60, 8))
    for loaded in (model, remapped):
        answers = [
            engine_on(loaded, 4)
            .with_method(apb_jax.APB(24, 8, query_at=3, shared_anchor=shared))
            .generate(documents, [QUERY, QUERY[:5]], 2, stop_ids=(), logits=True)
            for shared in (True, False)
        ]
        for got, wanted in zip(*answers, strict=True):
            agree(got, wanted, 2e-5)


class Garbage(apb_jax.APB):
    """APB whose layout carries other tokens wherever nothing may be read."""

    def layout(self, prompts: list[Prompt], shards: int) -> Layout:
        layout = super().layout(prompts, shards)
        tokens, positions = layout.tokens.copy(), layout.positions.copy()
        rng = np.random.default_rng(7)
        anchor = self.anchor_tokens
        dead = np.zeros_like(tokens, bool)
        if self.scorer == "heads":
            dead[:, 0, :anchor] = True  # the training-free scorer reads the query in shard 0's anchor
        for b in range(len(prompts)):
            dead[b, :, anchor + layout.block_rows[b] :] = True
        # The last shard's padding up to block_rows may change its own selection, which nobody receives.
        dead[:, -1, anchor + layout.kept_tokens[0, -1] :] = True
        tokens[dead] = rng.integers(1, 96, dead.sum())
        positions[dead] = rng.integers(0, 999, dead.sum())
        return Layout(
            layout.segments, tokens, positions, layout.block_rows, layout.document_tokens, layout.embedded_query_tokens
        )


@pytest.mark.parametrize("scorer", ["heads", "query"])
def test_garbage_in_padding_and_dead_anchor_changes_no_bit(model: Any, scorer: str) -> None:
    """Padding of the bucket, of the last block, and shard 0's anchor: any token there gives the same bits."""
    clean, dirty = (
        answer(model, kind(24, 16, query_at=3, scorer=scorer), 4, document=DOCUMENT[:203])
        for kind in (apb_jax.APB, Garbage)
    )
    np.testing.assert_array_equal(clean.query_logits, dirty.query_logits)
    np.testing.assert_array_equal(clean.step_logits, dirty.step_logits)


class FilledSlots(apb_jax.APB):
    """APB whose unused passing slots hold NaN."""

    def exchange(self, scores: Any, k: Any, v: Any, shard: Any, *kernels: Any) -> Any:
        index, *pair = super().exchange(scores, k, v, shard, *kernels)
        unused = jnp.arange(pair[0].shape[1]) < (shard.count - 1 - shard.index) * self.passing_tokens
        return index, *(jnp.where(unused[None, :, None, None], jnp.nan, x) for x in pair)


def test_unused_passing_slots_are_never_read(model: Any) -> None:
    clean, filled = (answer(model, kind(24, 16, query_at=3), 4) for kind in (apb_jax.APB, FilledSlots))
    np.testing.assert_array_equal(clean.query_logits, filled.query_logits)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (apb_jax.APB(24, 16, query_at=3), {"all_gather": 1}),
        (apb_jax.APB(24, 16, query_at=3, scorer="query"), {"all_gather": 1}),
        (apb_jax.APB(24, 0, query_at=3), {}),
        # One small psum: the anchor's last rows, which pooling reaches from the block.
        (apb_jax.APB(24, 16, query_at=3, shared_anchor=True), {"all_gather": 1, "psum": 1}),
        (apb_jax.APB(24, 0, query_at=3, shared_anchor=True), {"all_gather": 1}),
        (apb_jax.Full(), {"all_gather": 1}),
    ],
)
def test_collectives_per_layer(model: Any, method: Any, expected: dict[str, int]) -> None:
    """A prefill layer exchanges once; K and V travel together."""
    engine = apb_jax.Engine(model, method, apb_jax.make_mesh(sp=4))
    assert count_collectives(prefill_jaxpr(engine, method)) == expected


def test_collectives_with_tensor_parallelism(model: Any) -> None:
    """Megatron's two ``psum`` a layer (o_proj, down_proj), and one more for the retaining head's hidden row."""
    method = apb_jax.APB(24, 16, query_at=3)
    engine = apb_jax.Engine(model, method, apb_jax.make_mesh(sp=4, tp=2))
    assert count_collectives(prefill_jaxpr(engine, method)) == {"all_gather": 1, "psum": 3}


def prefill_jaxpr(engine: Any, method: Any) -> Any:
    """The jaxpr of one layer's prefill program."""
    captured: list[Any] = []
    traced = engine.programs.traced

    def capture(body: Any, *rest: Any, **options: Any) -> Any:
        program = traced(body, *rest, **options)
        if body.__name__ == "prefill_layers":
            captured.append(program)
        return program

    call = engine.programs.call
    shapes: list[Any] = []

    def remember(name: str, static: Any, make: Any, args: Any) -> Any:
        if name == "prefill":
            shapes.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), args))
        return call(name, static, make, args)

    engine.programs.traced, engine.programs.call = capture, remember
    engine.prefill([engine.prompt(DOCUMENT, QUERY)])
    return captured[0].trace(*shapes[0]).jaxpr


def test_two_documents_of_one_bucket_compile_once(model: Any) -> None:
    engine = apb_jax.Engine(model, apb_jax.APB(24, 16, query_at=3), apb_jax.make_mesh(sp=4))
    engine.generate(DOCUMENT, QUERY, 6)
    programs = dict(engine.programs.compiled)
    engine.generate(ids(8, 233), QUERY[:4], 6)
    assert engine.programs.compiled == programs


@pytest.mark.parametrize(
    ("tokens", "method", "why"),
    [
        (20, apb_jax.APB(24, 2, query_at=3), "shard 0 may pass only what lies behind the anchor"),
        (5, "apb", "does not give each of 4 shards a block"),
        (251, apb_jax.APB(11, 4, query_at=3), "cannot hold a query of 9 tokens at index 3"),
        (251, apb_jax.APB(0, 64, query_at=0, embed_query=False), "passing 64 tokens out of blocks of 63"),
    ],
)
def test_what_does_not_fit_falls_back_to_full_and_says_so(model: Any, tokens: int, method: Any, why: str) -> None:
    document = DOCUMENT[:tokens]
    got = answer(model, method, 4, document=document)
    assert got.method == apb_jax.Full()
    assert len(got.notes) == 1
    assert why in got.notes[0]
    agree(got, answer(model, "full", 1, document=document))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"anchor_tokens": -1, "passing_tokens": 4}, "anchor_tokens is -1; it must be 0 or more"),
        ({"anchor_tokens": 8, "passing_tokens": -4}, "passing_tokens is -4"),
        ({"anchor_tokens": 8, "passing_tokens": 4, "scorer": "best"}, "scorer 'best' is unknown"),
        ({"anchor_tokens": 8, "passing_tokens": 4, "pool": 4}, "pool is 4; it must be an odd number"),
    ],
)
def test_wrong_hyper_parameters_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        apb_jax.APB(**options)


def test_first_rows_of_the_document_are_never_passed(model: Any) -> None:
    """Shard 0 masks as many rows as an anchor has: the others see those tokens through their anchor."""
    method = apb_jax.APB(24, 16, query_at=3)
    engine = engine_on(model, 4).with_method(method)
    seen: list[np.ndarray] = []

    class Recording(apb_jax.APB):
        def exchange(self, scores: Any, k: Any, v: Any, shard: Any, *kernels: Any) -> Any:
            result = super().exchange(scores, k, v, shard, *kernels)
            jax.debug.callback(lambda i, r: seen.append((int(r), np.asarray(i))), result[0], shard.index)
            return result

    engine.with_method(Recording(24, 16, query_at=3)).prefill([engine.prompt(DOCUMENT, QUERY)])
    jax.effects_barrier()
    assert len(seen) == 4 * model.config.num_layers
    for shard, index in seen:
        assert index.min() >= (48 if shard == 0 else 24)
        assert index.max() < 24 + 63


@pytest.mark.parametrize(
    "method", [apb_jax.APB(24, 16, query_at=3), apb_jax.APB(24, 16, query_at=3, scorer="query"), apb_jax.Full()]
)
def test_shards_on_one_device_agree_with_a_mesh(model: Any, method: Any) -> None:
    virtual = apb_jax.Engine(model, method, apb_jax.make_mesh(sp=1), shards=4)
    got = virtual.generate([DOCUMENT, DOCUMENT[:190]], QUERY, 4, stop_ids=(), logits=True)
    want = (
        engine_on(model, 4).with_method(method).generate([DOCUMENT, DOCUMENT[:190]], QUERY, 4, stop_ids=(), logits=True)
    )
    for a, b in zip(got, want, strict=True):
        agree(a, b)


def test_without_heads_the_query_scores_and_the_answer_says_so() -> None:
    """Only heads asked for by name are refused."""
    bare = random_model(retaining_hidden=None)
    got = answer(bare, apb_jax.APB(24, 16, query_at=3), 4)
    assert got.method == apb_jax.APB(24, 16, query_at=3, scorer="query")
    assert got.notes == ("no retaining heads: keys are scored by the query's own attention (training-free)",)
    with pytest.raises(UserError, match="needs retaining heads and random has none"):
        engine_on(bare, 4).with_method(apb_jax.MethodSpec("apb", {"scorer": "heads"}))


def test_a_scorer_that_was_chosen_needs_no_note(model: Any) -> None:
    assert answer(model, apb_jax.APB(24, 16, query_at=3, scorer="query"), 4).notes == ()

"""Every method at its exact limit is full attention, away from it is not, and exchanges what it says it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention.method_cases import (
    CASES,
    DOCUMENT,
    QUERY,
    answer,
    difference,
    method,
    model,
    string_model,
    traffic,
)
from helpers import DATA, ids

import apb_jax
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.method import Setup
from apb_jax.attention.minference import read_patterns
from apb_jax.attention.registry import METHODS, resolve
from apb_jax.attention.ring import ring_order
from apb_jax.attention.ulysses import kv_slots, ring_shards_for
from apb_jax.errors import UserError

TOLERANCE = 2e-5  # float32, logits of order 1
EXACT = [(name, *case) for name, row in CASES.items() for case in row.exact]
COLLECTIVES = [(name, *case) for name, row in CASES.items() for case in row.collectives]
INEXACT = [(name, *row.inexact) for name, row in CASES.items() if row.inexact]


def name_of(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return str(value)


@pytest.fixture(scope="module")
def truth() -> apb_jax.Answer:
    return answer("full", 1, new_tokens=2)


def test_every_method_has_a_row() -> None:
    """APB has a file of its own."""
    assert set(CASES) | {"apb"} == set(METHODS)
    for name, row in CASES.items():
        can = METHODS[name].can
        assert can.exact == (row.inexact is None)
        assert can.max_shards != 1 or {sp for sp, _ in row.exact} == {1}


@pytest.mark.parametrize(("name", "sp", "fields"), EXACT, ids=name_of)
def test_exact_limit(truth: apb_jax.Answer, name: str, sp: int, fields: dict[str, Any]) -> None:
    got = answer(method(name, **fields), sp)
    assert difference(got, truth) < TOLERANCE
    assert got.tokens == truth.tokens[: len(got.tokens)]


@pytest.mark.parametrize(("name", "sp", "fields"), INEXACT, ids=name_of)
def test_not_exact_elsewhere(truth: apb_jax.Answer, name: str, sp: int, fields: dict[str, Any]) -> None:
    assert difference(answer(method(name, **fields), sp), truth) > 1e-3


@pytest.mark.parametrize(("name", "sp", "fields", "wanted"), COLLECTIVES, ids=name_of)
def test_collectives_of_a_layer(name: str, sp: int, fields: dict[str, Any], wanted: dict[str, int]) -> None:
    found = traffic(method(name, **fields), sp)
    assert found.collectives == wanted
    assert (found.received_bytes > 0) == bool(wanted)


def test_bytes_of_a_layer() -> None:
    """float32, 256 padded rows, 2 KV heads of 16: K and V of a token are 256 bytes, q of 4 heads as many."""
    token = 2 * 2 * 16 * 4
    assert traffic(method("full"), 4).received_bytes == 256 * token * 3 // 4
    assert traffic(method("ring"), 4).received_bytes == 3 * 64 * token  # three steps of a shard's 64 rows
    # q, K and V in, the output back: 3 of 4 parts of a shard's rows cross, and 2 KV heads fill 4 slots.
    sent = 64 * 16 * 4 * (4 + 2 * 4 + 4)
    assert traffic(method("ulysses"), 4).received_bytes == sent * 3 // 4
    assert traffic(method("star"), 4).received_bytes == 0


@pytest.mark.parametrize(
    ("name", "sp", "fields"),
    [("full", 4, {}), ("ring", 4, {}), ("ulysses", 2, {}), ("star", 4, {}), ("star", 2, {"block_tokens": 20})],
    ids=name_of,
)
def test_a_batch_is_its_requests(name: str, sp: int, fields: dict[str, Any]) -> None:
    documents = [DOCUMENT, ids(5, 90)]
    chosen = method(name, **fields)
    together = answer(chosen, sp, document=documents)
    for one, document in zip(together, documents, strict=True):
        assert difference(one, answer(chosen, sp, document=document)) < TOLERANCE


def test_star_does_not_depend_on_how_blocks_are_spread() -> None:
    chosen = method("star", block_tokens=24, anchor_tokens=10)
    one = answer(chosen, 1)
    assert difference(answer(chosen, 4), one) < TOLERANCE  # 11 blocks: 3, 3, 3, 2
    assert difference(answer(chosen, 8), one) < TOLERANCE


def test_window_generation_forgets_the_middle() -> None:
    """Sinks and window: tokens outside both change nothing once prefill does not carry them either."""
    chosen = method("streaming", sink_tokens=4, window_tokens=16, generation="window")
    changed = list(DOCUMENT)
    # Two layers of a 16-token window reach 32 tokens back; the query's 9 rows see what lies behind that only as sinks.
    changed[100:120] = ids(9, 20)
    assert difference(answer(chosen, 1), answer(chosen, 1, document=changed)) == 0
    dense = method("streaming", sink_tokens=4, window_tokens=16)
    assert difference(answer(dense, 1), answer(dense, 1, document=changed)) > 1e-3


# ---- STRING ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "local"),
    [(251 + 9 + 2, 8), (40, 40)],
    ids=["offset beyond the length", "local equals offset"],
)
def test_string_limits_are_rope(truth: apb_jax.Answer, offset: int, local: int) -> None:
    loaded = string_model(offset, local, 1.0)
    if local == offset:  # without the border counted twice nothing is left of STRING
        loaded = _once(loaded)
    assert difference(answer("full", 1, loaded), truth) < TOLERANCE


def _once(loaded: apb_jax.LoadedModel) -> apb_jax.LoadedModel:
    from dataclasses import replace

    return replace(loaded, config=replace(loaded.config, rope=replace(loaded.config.rope, border_twice=False)))


@pytest.mark.parametrize(
    ("name", "sp", "fields"),
    [("full", 4, {}), ("apb", 4, {"anchor_tokens": 0, "passing_tokens": 63, "query_at": 0, "embed_query": False}),
     ("ring", 4, {}), ("ring", 2, {"order": "plain"}), ("ulysses", 4, {}), ("star", 2, {}), ("starx", 1, {}),
     ("ulysses", 8, {"ring_shards": 2}), ("streaming", 1, {"sink_tokens": 256, "window_tokens": 32})],
    ids=name_of,
)  # fmt: skip
def test_string_composes_with_the_methods(name: str, sp: int, fields: dict[str, Any]) -> None:
    loaded = string_model(40, 8, 1.07)
    expected = answer("full", 1, loaded, new_tokens=2)
    assert difference(expected, answer("full", 1, new_tokens=2)) > 1e-3
    new_tokens = 2 if name == "ring" else 1  # decoding is the same for all of them
    assert difference(answer(method(name, **fields), sp, loaded, new_tokens=new_tokens), expected) < TOLERANCE


# ---- layouts and refusals --------------------------------------------------------------------------------------------


def test_zigzag_gives_every_shard_the_same_work() -> None:
    order = ring_order(8, "zigzag")
    assert sorted(order.reshape(-1)) == list(range(16))
    assert set((order + 1).sum(axis=1)) == {17}


def test_kv_slots_serve_the_right_query_heads() -> None:
    for heads, kv_heads, parts in [(32, 8, 8), (32, 8, 16), (40, 8, 5), (4, 2, 4), (56, 8, 7), (32, 8, 2)]:
        slots = kv_slots(heads, kv_heads, parts)
        width = slots.shape[1]
        for part in range(parts):
            for own in range(heads // parts):
                slot = own // (heads // parts // width)
                assert slots[part, slot] == (part * (heads // parts) + own) // (heads // kv_heads)
    assert kv_slots(32, 8, 8).shape == (8, 1)  # nothing is replicated
    assert kv_slots(32, 8, 16).shape == (16, 1)  # each KV head twice, once per shard that needs it


def test_smallest_ring() -> None:
    assert [ring_shards_for(32, n) for n in (1, 2, 8, 12)] == [1, 1, 1, 3]
    assert ring_shards_for(40, 16) == 2


def test_ulysses_by_name_takes_the_ring_it_needs() -> None:
    engine = apb_jax.Engine(model(), "ulysses", apb_jax.make_mesh(sp=8))
    prompt = engine.prompt(DOCUMENT, QUERY)
    assert engine.choose([prompt])[0] == method("ulysses", ring_shards=2)


REFUSED = [
    ("locret", {}, 1, r"'locret' needs retaining heads and random has none; give --heads FILE"),
    ("minference", {"patterns": "PATTERNS"}, 1, r"has 3 layers, the model has 2; give its own file"),
    ("ulysses", {"ring_shards": 1}, 8, r"4 query heads cannot be split.*nearest legal choice: ring_shards 2"),
    ("ulysses", {"ring_shards": 3}, 8, r"ring_shards 3 of 8 shards.*nearest legal choice: ring_shards 2"),
    ("streaming", {}, 4, r"'streaming' runs on one shard, here are 4; nearest legal choice: --sp 1"),
]


@pytest.mark.parametrize(("name", "options", "sp", "why"), REFUSED, ids=name_of)
def test_refused_before_weights(tmp_path: Path, name: str, options: dict[str, Any], sp: int, why: str) -> None:
    class NoWeights:
        fp8 = False

        def __getattr__(self, _: str) -> Any:
            raise AssertionError("weights were touched")

    from dataclasses import replace

    if "patterns" in options:
        (tmp_path / "patterns.json").write_text("[{}, {}, {}]")
        options = {"patterns": str(tmp_path / "patterns.json")}
    loaded = replace(model(), source=NoWeights(), retaining_hidden=None if name == "locret" else 24)
    with pytest.raises(UserError, match=why):
        apb_jax.Engine(loaded, apb_jax.MethodSpec(name, options), apb_jax.make_mesh(sp=sp))
    with pytest.raises(UserError, match=why):
        apb_jax.Engine(loaded, method(name, **options), apb_jax.make_mesh(sp=sp))


@pytest.mark.parametrize("name", ["minference", "xattention", "starx_sparse", "infllm", "locret", "spava"])
def test_string_is_refused_where_it_does_not_compose(name: str) -> None:
    with pytest.raises(UserError, match="does not compose with --rope string; nearest legal choice: the model's own"):
        apb_jax.Engine(string_model(40, 8, 1.0), apb_jax.MethodSpec(name), apb_jax.make_mesh(sp=1))


def test_one_shard_methods_on_several_shards_name_the_flag_to_change() -> None:
    with pytest.raises(UserError, match="runs on one shard, here are 4; nearest legal choice: --shards 1"):
        apb_jax.Engine(model(), "infllm", apb_jax.make_mesh(sp=1), shards=4)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_equals_full_is_said_where_the_limits_are() -> None:
    """The cases' exact limits and nothing else; that they are full attention is ``test_exact_limit``."""
    prompt = Prompt(*(np.asarray(a, np.int32) for a in (DOCUMENT, QUERY, QUERY)))
    for name, row in CASES.items():
        for sp, fields in row.exact:
            said = method(name, **fields).equals_full([prompt], sp)
            # A window that the answer may outgrow holds the document for now only.
            silent = METHODS[name].can.exact or "generation" in fields
            assert (said is None) == silent, (name, fields, said)
        if row.inexact:
            sp, fields = row.inexact
            assert method(name, **fields).equals_full([prompt], sp) is None, name


def test_a_method_that_is_full_attention_says_so_in_the_answer() -> None:
    """Whoever asks: by name on one shard, or as an object whose budget holds the document."""
    got = answer("apb", 1)
    assert got.notes == ("apb is plain full attention here: one shard; --shards 8 splits the document on one device",)
    got = answer(method("streaming", sink_tokens=0, window_tokens=256), 1)
    assert got.notes == (
        "streaming is plain full attention here: sinks and window, 256 tokens together, hold the whole document",
    )
    assert answer("ring", 1).notes == ()


def setup(shards: int = 4, tokens: int = 8192, **facts: Any) -> Setup:
    prompt = Prompt(*(np.arange(n, dtype=np.int32) for n in (tokens, 20, 12)))
    facts = {"model": "random", "has_heads": True, "query_at": 3, **facts}
    return Setup(model().config, shards=shards, devices=shards, prompts=(prompt,), **facts)


CHOSEN = [
    # name, options, facts of the setup, fields decided
    ("apb", {}, {}, {"anchor_tokens": 256, "passing_tokens": 256, "query_at": 3, "scorer": "heads"}),
    ("apb", {}, {"model": "tiny", "shards": 8}, {"anchor_tokens": 256, "passing_tokens": 128}),
    ("apb", {"anchor_tokens": 64, "pool": 3}, {}, {"anchor_tokens": 64, "passing_tokens": 256, "pool": 3}),
    ("apb", {"query_at": None, "scorer": None}, {"has_heads": False}, {"query_at": 3, "scorer": "query"}),
    ("apb", {}, {"tokens": 400}, {"anchor_tokens": 48, "passing_tokens": 49}),  # blocks of 97 to 128 tokens
    ("ulysses", {}, {"shards": 8}, {"ring_shards": 2}),
    ("ulysses", {"ring_shards": 4}, {"shards": 8}, {"ring_shards": 4}),
    ("starx_sparse", {}, {}, {"block_tokens": 2048}),
    ("starx_sparse", {"sparse_block": 48}, {}, {"block_tokens": 2064, "sparse_block": 48}),
    ("spava", {}, {"tokens": 16384}, {"anchor_tokens": 256, "passing_tokens": 128}),
    ("spava", {}, {"tokens": 400}, {"anchor_tokens": 96, "passing_tokens": 36}),
    ("minference", {}, {"model": "llama3.1-8b", "shards": 1}, {"vertical": 512, "slash": 2048}),
    ("minference", {"slash": 99}, {"model": "tiny", "shards": 1}, {"vertical": 64, "slash": 99}),
    ("xattention", {}, {"model": "llama3.1-8b"}, {"threshold": "llama3.1-8b", "stride": 8}),
    ("xattention", {"stride": 4}, {"model": "llama3.1-8b"}, {"threshold": 0.9}),
    ("streaming", {}, {"model": "tiny", "shards": 1}, {"sink_tokens": 64, "window_tokens": 256}),
    ("star", {"block_tokens": 64}, {"tokens": 8192}, {"block_tokens": 64, "anchor_tokens": None}),
]


@pytest.mark.parametrize(("name", "options", "facts", "fields"), CHOSEN, ids=name_of)
def test_hyper_parameters_are_decided(
    name: str, options: dict[str, Any], facts: dict[str, Any], fields: dict[str, Any]
) -> None:
    """As given, else the model's own, else the method's by length, shards and heads."""
    chosen, _ = resolve(apb_jax.MethodSpec(name, options), setup(**facts))
    assert chosen.name == name
    assert {field: getattr(chosen, field) for field in fields} == fields


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("streaming", {"window_tokens": "abc"}, "window_tokens is 'abc'; it must be a whole number"),
        ("streaming", {"window_tokens": 512.5}, "window_tokens is 512.5; it must be a whole number"),
        ("streaming", {"window_tokens": True}, "window_tokens is True; it must be a whole number"),
        ("streaming", {"generation": 5}, "generation is 5; it must be a word"),
        ("apb", {"pool": "five"}, "pool is 'five'; it must be a whole number"),
        ("apb", {"shared_anchor": 1}, "shared_anchor is 1; it must be true or false"),
        ("apb", {"query_at": "start"}, "query_at is 'start'; it must be a whole number or none"),
        ("xattention", {"threshold": [0.9]}, r"threshold is \[0.9\]; it must be a number or a word"),
        ("full", {"name": 5}, "method 'full' has no option 'name'; it takes no options"),
        ("star", {"can": 5}, "method 'star' has no option 'can'; it takes block_tokens, anchor_tokens"),
    ],
)
def test_options_have_the_types_of_the_fields(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        apb_jax.MethodSpec(name, options)
    if not options.keys() & {"name", "can"}:
        with pytest.raises(UserError, match=why):
            method(name, **({"anchor_tokens": 8, "passing_tokens": 8} if name == "apb" else {}) | options)


def test_numbers_of_numpy_and_whole_numbers_where_fractions_go_are_taken() -> None:
    assert method("minference", vertical=np.int32(8), ratio=1).ratio == 1
    assert apb_jax.MethodSpec("xattention", {"threshold": 1, "stride": None}).given == {"threshold": 1}


def test_keys_of_the_picture() -> None:
    prompt = Prompt(*(np.arange(n, dtype=np.int32) for n in (256, 9, 9)))
    shown = {
        ("full", ()): [{"earlier": 0, "block": 64}, {"earlier": 192, "block": 64}],
        ("star", ()): [{"block": 64}, {"anchor": 64, "block": 64}],
        # The anchor's rows are shared out over the shards, its keys are not.
        ("apb", (("anchor_tokens", 24), ("passing_tokens", 16), ("shared_anchor", True))): [
            {"passing": 0, "block": 64}, {"passing": 48, "anchor": 24, "block": 64},
        ],
    }  # fmt: skip
    for (name, fields), wanted in shown.items():
        chosen = method(name, **dict(fields))
        layout = chosen.layout([prompt], 4)
        assert [chosen.visible_keys(layout, shard) for shard in (0, 3)] == wanted


# ---- MInference's pattern files --------------------------------------------------------------------------------------


def test_a_pattern_file_mixes_types_per_head(tmp_path: Path) -> None:
    """Each head follows its own row: where all patterns are wide enough, the result is full attention."""
    wide = {
        "0": ["vertical_and_slash", 300, 50, 0.9],
        "1": ["stream_llm", 4, 300, 0.9],
        "2": ["block_sparse", 100, 1, 1],
    }
    narrow = wide | {"1": ["stream_llm", 4, 32, 0.9]}
    full = answer("full", 1)
    for rows, exact in ((wide, True), (narrow, False)):
        path = tmp_path / f"{exact}.json"
        path.write_text(json.dumps([rows, {str(h): rows[str(h % 3)] for h in range(4)}]))
        got = answer(method("minference", patterns=str(path)), 1)
        assert (difference(got, full) < TOLERANCE) == exact
        assert difference(got, full) < 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("{}", "must be a list with one object per layer"),
        ('[{"0": ["diagonal", 1, 2, 3]}, {}]', "layer 0 head 0 has type 'diagonal'"),
        ('[{}, {"7": ["stream_llm", 1, 2, 3]}]', "layer 1 has head 7, the model has 4 heads"),
    ],
)
def test_broken_pattern_files(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(text)
    with pytest.raises(UserError, match=why):
        read_patterns(str(path), 4)


def test_published_pattern_files() -> None:
    """Counts as the specification states them, on the files themselves."""
    folder = DATA / "minference_patterns"
    if not folder.is_dir():
        pytest.skip(f"no pattern files in {folder}")
    newest = read_patterns(str(folder / "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json"), 32)
    assert newest.types.shape == (32, 32)
    assert set(newest.vertical.flat) == {512}
    assert set(newest.slash.flat) == {2048}
    older = read_patterns(str(folder / "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json"), 32)
    pairs = list(zip(older.vertical.flat, older.slash.flat, strict=True))
    assert {p: pairs.count(p) for p in set(pairs)} == {
        (100, 800): 297, (1000, 6096): 279, (30, 800): 175, (3500, 100): 149, (500, 700): 120, (100, 750): 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("ring", {"order": "zig"}, "'zig' is unknown; choose one of zigzag, plain"),
        ("star", {"block_tokens": 8, "anchor_tokens": 9}, "nearest legal choice: anchor_tokens 8"),
        ("star", {"anchor_tokens": 9}, "needs block_tokens"),
        ("streaming", {"window_tokens": 0}, "window_tokens is 0; it must be at least 1"),
        ("xattention", {"stride": 5}, "stride is 5; choose one of 4, 8, 16"),
        ("xattention", {"threshold": 1.5}, "must lie above 0 and at most at 1"),
        ("xattention", {"threshold": "gpt"}, "no XAttention thresholds for 'gpt' at stride 8; there are: llama3.1-8b"),
        ("starx_sparse", {"block_tokens": 200}, r"must be a multiple of 128 \(nearest: 256\)"),
        ("minference", {"slash": 0}, "slash is 0; it must be at least 1"),
        ("infllm", {"representative_tokens": 200}, "nearest legal choice: 128"),
        ("locret", {"budget_tokens": 100}, "2500 stabilizers fill the budget of 100; nearest legal choice: 99"),
        ("spava", {"anchor_tokens": 0, "passing_tokens": 1}, "anchor_tokens is 0"),
    ],
)
def test_fields_are_checked(name: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        method(name, **fields)


def test_methods_are_jit_keys() -> None:
    """Frozen, hashable and equal by value: a second request with the same settings compiles nothing."""
    for name, row in CASES.items():
        fields = row.exact[0][1]
        assert hash(method(name, **fields)) == hash(method(name, **fields))

"""The needle prompt, the evaluation's bookkeeping, and that the packaged model retrieves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import apb_jax
from apb_jax.errors import UserError
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.grading import is_correct, wilson
from apb_jax.synthetic.haystack import filler
from apb_jax.synthetic.needle import needle_prompt
from apb_jax.tiny import FOLDER
from apb_jax.tiny.evaluate import METHODS, REGISTRY, Budget, items, main, markdown, shards_of
from apb_jax.tiny.tokenizer import BOS_ID


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def test_needle_stands_at_its_depth_in_a_document_of_that_length(tokenizer: PreTrainedTokenizerFast) -> None:
    for seed, depth in enumerate((0.0, 0.25, 0.5, 0.9, 1.0)):
        prompt = needle_prompt(tokenizer, 1500, "123456789", depth, seed)
        assert prompt.answer == "123456789"
        assert prompt.document.count("123456789") == 1
        assert prompt.document.index("One of the special magic") / len(prompt.document) == pytest.approx(
            depth, abs=0.07
        )
        assert 1372 <= len(tokenizer.encode(prompt.document, add_special_tokens=False)) <= 1500
        key = prompt.query.split(" for ")[1].split(" mentioned")[0]
        assert f"numbers for {key} is: 123456789." in prompt.document
        assert prompt == needle_prompt(tokenizer, 1500, "123456789", depth, seed)


@pytest.mark.parametrize(
    ("tokens", "digits", "depth", "seed", "says"),
    [
        (500, "12a", 0.5, 0, "12a"),
        (500, "", 0.5, 0, "must be a number"),
        (500, "12", 1.5, 0, "1.5"),
        (500, "12", float("nan"), 0, "nan"),
        (5, "12", 0.5, 0, "5 tokens"),
        (500, "12", 0.5, -1, "-1"),
    ],
)
def test_bad_needles_are_refused(
    tokenizer: PreTrainedTokenizerFast, tokens: int, digits: str, depth: float, seed: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        needle_prompt(tokenizer, tokens, digits, depth, seed)


def test_items_are_the_same_for_every_method_and_differ_by_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    first, second = (items("multikey", 600, 3, 1, encoder, (filler(),)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.document, b.document)
        assert a.values == b.values
        assert a.document[0] == BOS_ID
        assert len(a.document) <= 600
    other = items("multikey", 600, 3, 2, encoder, (filler(),))
    assert [x.values for x in other] != [x.values for x in first]


def test_scoring_wants_all_values_and_no_others() -> None:
    assert is_correct(" 12, 34.", ("34", "12"))
    assert not is_correct(" 12.", ("34", "12"))
    assert not is_correct(" 12, 34, 56.", ("34", "12"))
    assert not is_correct(" 123.", ("12",))
    assert is_correct(" ABCDE FGHIJ", ("ABCDE", "FGHIJ"))


def test_wilson_interval() -> None:
    low, high = wilson(64, 64)
    assert (round(low, 4), high) == (0.9434, 1.0)
    low, high = wilson(32, 64)
    assert low == pytest.approx(0.3808, abs=1e-3)
    assert low + high == pytest.approx(1.0)


def test_budgets_are_the_papers_shares_of_a_block() -> None:
    assert Budget.of(8192, 8) == Budget(256, 128)
    assert Budget.of(16384, 8) == Budget(512, 256)


def test_table() -> None:
    cells = {
        "full/vt/512": {"method": "full", "task": "vt", "tokens": 512, "correct": 32, "count": 64},
        "star/single/512": {"method": "star", "task": "single", "tokens": 512, "correct": 64, "count": 64},
    }
    assert markdown(cells).splitlines() == [
        "| 512 tokens | vt | single |",
        "|---|---|---|",
        "| full | 50 [38, 62] |  |",
        "| star |  | 100 [94, 100] |",
    ]


def test_every_method_of_the_registry_has_a_row() -> None:
    assert set(METHODS) - {"apb-heads", "apb-query", "apb-random", "anchor-only"} == set(REGISTRY) - {"apb"}
    assert shards_of("apb-heads", 8) == shards_of("ring", 8) == 8
    assert shards_of("full", 8) == shards_of("locret", 8) == 1


def test_the_packaged_model_finds_needles_in_full_and_through_apb(tokenizer: PreTrainedTokenizerFast) -> None:
    model = apb_jax.load("tiny")
    apb = apb_jax.APB(anchor_tokens=128, passing_tokens=32)
    for method, shards in ((apb_jax.Full(), 1), (apb, 4)):
        engine = apb_jax.Engine(model, method=method, mesh=apb_jax.make_mesh(sp=shards))
        prompts = [needle_prompt(tokenizer, 1000, ("8316942", "570931826")[i], 0.3 + 0.4 * i, i) for i in range(2)]
        answers = engine.generate([p.document for p in prompts], [p.query for p in prompts], max_new_tokens=14)
        assert [a.method.name for a in answers] == [method.name] * 2
        assert getattr(answers[0].method, "query_at", 1) == 1  # behind the begin-of-text token, as the template says
        assert [a.text.strip(" .") for a in answers] == [p.answer for p in prompts]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "magic"], "magic"),
        (["--tasks", "tea"], "tea"),
        (["--samples", "0"], "--samples is 0"),
        (["--anchor", "128"], "go together"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "e"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error

"""Task generators: determinism, lengths, tokens piece by piece, answers that stand in the text, held-out words."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import filler, novel
from apb_jax.synthetic.sample import Role, Sample, text_of, tokens_of
from apb_jax.synthetic.tasks import QUESTION_TASKS, TASKS, World
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny import FOLDER


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(PreTrainedTokenizerFast.from_pretrained(FOLDER))


def world(encoder: Encoder, seed: int, *, varied: bool) -> World:
    words = vocabulary(held_out=not varied)
    return World(np.random.default_rng(seed), encoder, words, (filler(), novel()), varied=varied)


def drawn(encoder: Encoder, task: str, seed: int, tokens: int = 700, *, varied: bool) -> Sample:
    return TASKS[task](world(encoder, seed, varied=varied), tokens)


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_sample_and_lengths_hold(encoder: Encoder, task: str, varied: bool) -> None:
    first = drawn(encoder, task, 5, varied=varied)
    assert first == drawn(encoder, task, 5, varied=varied)
    assert first != drawn(encoder, task, 6, varied=varied)
    for seed in range(4):
        for tokens in (500, 1200):
            size = len(tokens_of(drawn(encoder, task, seed, tokens, varied=varied).document, encoder))
            assert tokens - 100 < size <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_pieces_tokenise_like_the_whole_text(encoder: Encoder, task: str) -> None:
    for seed in range(6):
        sample = drawn(encoder, task, seed, varied=True)
        lines = [sample.document, *((q.text, q.answer) for q in sample.questions)]
        for line in lines:
            whole = encoder.tokenizer.encode(text_of(line), add_special_tokens=False)
            assert tokens_of(line, encoder).tolist() == whole


@pytest.mark.parametrize("task", QUESTION_TASKS)
@pytest.mark.parametrize("varied", [False, True])
def test_values_stand_in_document_and_answer(encoder: Encoder, task: str, varied: bool) -> None:
    for seed in range(5):
        sample = drawn(encoder, task, seed, varied=varied)
        assert sample.questions
        for question in sample.questions:
            answer = text_of((question.answer,))
            assert answer.startswith(" ")
            for value in question.values:
                assert re.search(rf"\b{value}\b", sample.document_text)
                assert re.search(rf"\b{value}\b", answer)


def test_update_asks_for_the_first_or_the_last_of_two(encoder: Encoder) -> None:
    which = []
    for seed in range(12):
        sample = drawn(encoder, "update", seed, varied=False)
        for question in sample.questions:
            text = text_of((question.text,))
            key = re.search(r"number for (\S+) mentioned", text)[1]
            stated = re.findall(rf"The special magic number for {key} is: (\d+)\.", sample.document_text)
            assert len(stated) == 2
            assert question.values == (stated[0] if " first " in text else stated[1],)
            which.append(" first " in text)
    assert 0.2 < np.mean(which) < 0.8


def test_chains_lead_from_the_value_to_every_variable(encoder: Encoder) -> None:
    for seed in range(5):
        sample = drawn(encoder, "vt", seed, varied=False)
        (question,) = sample.questions
        value = re.search(r"assigned the value (\d+) in", text_of((question.text,)))[1]
        reached = re.findall(rf"VAR ([A-Z]{{5}}) = {value}\b", sample.document_text)
        for name in reached:
            reached += re.findall(rf"VAR ([A-Z]{{5}}) = VAR {name}\b", sample.document_text)
        assert tuple(reached) == question.values
        assert len(reached) == 5


def test_relay_needs_the_other_sentence(encoder: Encoder) -> None:
    sample = drawn(encoder, "relay", 3, varied=False)
    for question in sample.questions:
        who = re.search(r"number of (\w+)\?", text_of((question.text,)))[1]
        assert not re.search(rf"number of {who} is", sample.document_text)
        other = re.search(rf"{who} has the same number as (\w+)", sample.document_text)[1]
        assert f"The number of {other} is {question.values[0]}." in sample.document_text


def test_depths_of_needles_are_spread_evenly(encoder: Encoder) -> None:
    depths = []
    one = world(encoder, 0, varied=False)
    for _ in range(150):
        text = TASKS["single"](one, 600).document_text
        depths.append(text.index("One of the special magic numbers") / len(text))
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert counts.min() > 15  # 30 expected


def test_evaluation_words_never_occur_in_training_keys(encoder: Encoder) -> None:
    training, held_out = vocabulary(held_out=False), vocabulary(held_out=True)
    for field in ("adjectives", "nouns", "variables"):
        assert not set(getattr(training, field)) & set(getattr(held_out, field))
        assert len(getattr(held_out, field)) > 50
    one = world(encoder, 1, varied=False)
    for _ in range(10):
        (key,) = re.findall(r"numbers for (\w+-\w+) is", TASKS["single"](one, 300).document_text)
        adjective, noun = key.split("-")
        assert adjective in held_out.adjectives
        assert noun in held_out.nouns


def test_bare_questions_carry_no_wording_of_a_template(encoder: Encoder) -> None:
    for task in QUESTION_TASKS:
        bare = replace(world(encoder, 2, varied=True), bare_questions=True)
        for question in TASKS[task](bare, 600).questions:
            text = text_of((question.text,))
            assert text[0].isupper()
            assert "\n" not in text
            assert text[-1] in "?."


def test_only_what_follows_from_the_text_is_an_answer(encoder: Encoder) -> None:
    """A value's first statement is never something to predict."""
    for seed in range(10):
        for task in ("single", "multikey", "haystack", "update", "multivalue"):
            seen: set[str] = set()
            for line in drawn(encoder, task, seed, varied=True).document:
                for piece in line:
                    if piece.text.isdigit():
                        assert (piece.role is Role.SECRET) == (piece.text not in seen)
                        seen.add(piece.text)

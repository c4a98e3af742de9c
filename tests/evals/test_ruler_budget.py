"""Prompts fill their length with any tokenizer; positions are distributed as specified."""

import io
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from apb_jax.synthetic.packaged import NOVEL, word_list
from evals.base import EvalError
from evals.ruler import EXTRA_TASKS, TASKS, NiahSpec, RulerTask, generate, needed_text
from evals.ruler.atoms import NOISE, KeyVocabulary, key_vocabulary
from evals.ruler.niah import DEPTHS
from evals.tokens import token_counter, whitespace_counter

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@cache
def tokenizer(name: str):
    if name == "bytes":
        return lambda text: len(text.encode())
    if name == "sentencepiece":
        import sentencepiece

        model = io.BytesIO()
        sentences = [line for line in NOVEL.read_text().splitlines() if line.strip()]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=4000,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
        return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    folder = ROOT / "apb_jax" / "tiny"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("apb_jax/tiny holds no tokenizer.json")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


LENGTHS = {
    "tiny": (3000, 4096, 6000, 8192, 12000),
    "bytes": (8192, 12000, 16384, 24000, 32768),
    "sentencepiece": (4096, 5000, 6000, 8192, 12000),
}


def need(task: str) -> Path | None:
    if needed_text(task) is None:
        return None
    if not DATA.is_dir():
        pytest.skip(f"{task} reads {needed_text(task)}: ../shared/data is absent")
    return DATA


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("task", [*TASKS, *EXTRA_TASKS])
def test_prompt_and_answer_fill_the_length(task, name):
    data, count = need(task), token_counter(tokenizer(name))
    for length in LENGTHS[name]:
        if task == "qa_2" and length < 5000 and name != "bytes":
            continue  # the ten documents that hold the answer are longer
        for example in generate(task, count, length, 2, variant="ruler_fit", data=data):
            used = count(example.prompt) + example.max_new_tokens
            assert used <= length
            assert length - used <= max(64, 0.02 * length), (length, used)
            assert all(reference in example.document for reference in example.references) or task in ("qa_1", "qa_2")


@pytest.mark.parametrize("task", TASKS)
def test_published_variants_stay_within_the_length(task):
    """All but frequent words of the older programs, which leave no room for the answer (a published defect)."""
    data = need(task)
    for variant, length in (("ruler_2024_06", 5000), ("ruler_main", 5000), ("star_attention", 20000)):
        for example in generate(task, whitespace_counter, length, 2, variant=variant, data=data):
            used = whitespace_counter(example.prompt) + (50 if task == "fwe" else example.max_new_tokens)
            allowed = length + (50 + 40 if task == "fwe" and variant != "ruler_main" else 0)
            assert 0.6 * length < used <= allowed


def flat(values, edges=10) -> float:
    """Greatest deviation of the ten deciles' shares from a tenth."""
    return float(np.abs(np.histogram(values, edges, (0, 1))[0] / len(values) - 1 / edges).max())


def test_noise_needles_stand_anywhere():
    depths = [e.info["depths"][0] for e in generate("niah_single_1", whitespace_counter, 1500, 1000)]
    assert flat(depths) < 0.04  # four standard deviations of a decile's share


def test_pass_keys_stand_anywhere():
    depths = [e.info["depths"][0] for e in generate("passkey", whitespace_counter, 1500, 1000, variant="ruler_fit")]
    assert flat(depths) < 0.04


def test_essay_needles_stand_at_the_forty_depths():
    data = need("niah_single_2")
    assert len(DEPTHS) == 40
    assert DEPTHS[:4] == (0, 3, 5, 8)
    places = Counter(
        example.document.index("One of the special magic")
        for example in generate("niah_single_2", whitespace_counter, 4096, 1000, variant="ruler_2024_06", data=data)
    )
    assert len(places) == 40
    assert all(abs(count - 25) < 25 for count in places.values())


def test_chains_are_in_order_and_spread():
    samples = [e.info["depths"] for e in generate("vt", whitespace_counter, 1500, 1000)]
    assert all(sample == sorted(sample) for sample in samples)
    means = np.mean(samples, axis=0)
    # Order statistics of five uniform places, moved back by the worked example in front.
    gaps = np.diff(means)
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.12)


def test_every_key_is_asked_equally_often():
    asked = Counter()
    for example in generate(NiahSpec("noise", keys=4), whitespace_counter, 1500, 1000):
        found = re.findall(r"is: (\d+)\.", example.document)
        asked[found.index(example.references[0])] += 1
    assert len(asked) == 4
    assert all(abs(count - 250) < 60 for count in asked.values())


def test_gold_document_has_one_rank_for_one_number_of_documents():
    data = need("qa_1")
    ranks = {}
    for example in generate("qa_1", whitespace_counter, 4096, 60, data=data):
        ranks.setdefault(example.info["documents"], set()).add(example.info["gold_rank"])
    assert all(len(found) == 1 for found in ranks.values())


def test_common_words_have_their_frequencies():
    example = next(generate("cwe", whitespace_counter, 4096, 1))
    words = Counter(re.findall(r"\d+\. (\S+)", example.document.rsplit("Below is a numbered", 1)[1]))
    assert all(words[word] == 30 for word in example.references)
    assert {count for word, count in words.items() if word not in example.references} == {3}


def test_frequent_words_rank_below_the_dots():
    example = next(generate("fwe", whitespace_counter, 4096, 1))
    words = Counter(example.document.split("coded words. ", 1)[1].split())
    ranked = [word for word, _ in words.most_common(4)]
    assert ranked[0] == "..."
    assert tuple(ranked[1:]) == example.references


def test_custom_needles():
    example = next(generate(NiahSpec("noise", values=4), whitespace_counter, 1500, 1))
    assert len(example.references) == 4
    example = next(generate(NiahSpec("needle", keys=2, queries=3), whitespace_counter, 1500, 1))
    assert len(example.references) == 3  # keys are raised to the number of questions
    assert NOISE not in example.document


def test_streams_are_repeatable_and_differ_by_seed():
    task = RulerTask("vt", whitespace_counter, 1500, 3, seed=1)
    first = [e.prompt for e in task.examples()]
    assert first == [e.prompt for e in task.examples()]
    assert first != [e.prompt for e in RulerTask("vt", whitespace_counter, 1500, 3, seed=2).examples()]


def test_only_one_sample_is_in_memory():
    stream = generate("niah_single_1", whitespace_counter, 4096, 10**9)
    assert next(stream).id == "0"
    assert next(stream).id == "1"


def test_key_vocabulary_is_the_sorted_set_of_pairs():
    adjectives = ["well", "blue", "well-made", "blue-eyed", "we", "blue"]
    nouns = ["cat", "eyed-cat", "made", "ATM", "made-cat"]
    expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
    words = KeyVocabulary(adjectives, nouns)
    assert [words[i] for i in range(len(words))] == expected
    assert len(key_vocabulary()) == len({f"{a}-" for a in word_list("adjectivelist")}) * len(set(word_list("nounlist")))


def test_too_short_a_length_says_what_is_needed():
    with pytest.raises(EvalError, match=r"vt at 64, ruler_fit: .* too short: the smallest prompt .* needs \d+ tokens"):
        next(generate("vt", whitespace_counter, 64, 1, variant="ruler_fit"))
    with pytest.raises(EvalError, match="common words needs at least 10 distinct words"):
        next(generate("cwe", whitespace_counter, 4096, 1, variant="star_attention"))


def test_common_words_stop_shrinking_at_ten_words():
    """At 4K ten words fill the list; a draw of long words must not end below them (the original asks for four)."""
    examples = list(generate("cwe", lambda text: int(0.55 * len(text)), 4096, 24))
    assert min(example.info["distinct_words"] for example in examples) >= 10
    assert len({example.info["distinct_words"] for example in examples}) > 1, "no draw had to shrink"
    assert all(example.info["length"] <= 4096 for example in examples)

"""Corpora: every accepted shape of a record, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from apb_jax.errors import UserError
from apb_jax.prompt.codec import PromptCodec, make_codec
from apb_jax.retaining.corpus import Corpus, Record, parse_record, read_data_set, read_records
from apb_jax.tiny import FOLDER


@pytest.fixture(scope="module")
def codec() -> PromptCodec:
    return make_codec(PreTrainedTokenizerFast.from_pretrained(FOLDER), "tiny")


SHARE_GPT = {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (SHARE_GPT, Record("ask", None, "reply")),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            Record("a", None, "b"),
        ),
        ({"context": "c", "question": "q", "answer": "a"}, Record("c", "q", "a")),
        ({"input": "c", "instruction": "q", "output": ["a", "b"]}, Record("c", "q", "a")),
        ({"prompt": "p", "response": "r"}, Record("p", None, "r")),
        ({"text": "t"}, Record("t", None, None)),
        ("plain", Record("plain", None, None)),
    ],
)
def test_records_of_every_shape(record: object, expected: Record) -> None:
    assert parse_record(record, "here") == expected


@pytest.mark.parametrize("record", [{"a": 1}, 7, {"conversations": []}, {"context": "c", "answer": ""}])
def test_other_records_are_refused_by_place(record: object) -> None:
    with pytest.raises(UserError, match="line 3"):
        parse_record(record, "line 3")


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(SHARE_GPT) + "\n\n" + json.dumps({"text": "t"}) + "\n")
    assert [r.document for r in read_records(lines)] == ["ask", "t"]
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps([SHARE_GPT]))
    assert read_records(whole) == [Record("ask", None, "reply")]
    text = tmp_path / "a.txt"
    text.write_text("words")
    assert read_records(text) == [Record("words", None, None)]


def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"context": "c", "question": "q", "answer": "a"}) + "\n")
    assert read_data_set(str(folder), "train") == [Record("c", "q", "a")]
    for name, split in ((str(folder), "nosuch"), (str(tmp_path / "absent"), "train")):
        with pytest.raises(UserError, match=r"cannot load data set") as caught:
            read_data_set(name, split)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "t"}\n{broken', "JSONL"),
        ("a.json", b"[1", "JSON"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"  \n", "empty"),
        ("a.txt", None, "no such file"),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_question_stands_in_front_and_in_the_answer(codec: PromptCodec) -> None:
    record = Record("The pass key is 123.", "What is it?", " 123.")
    corpus = Corpus((record,), codec, 512, 64)
    example = corpus.example(record)
    asked = codec.encode("\n\nQuestion: What is it?\nAnswer:")
    document = codec.encode(record.document)
    assert example.prompt.tolist() == [0, *asked, *document]
    assert example.answer.tolist() == [*asked, *codec.encode(" 123.")]
    bare = Corpus((record,), codec, 512, 64, embed_share=0.0).example(record)
    assert bare.prompt.tolist() == [0, *document]


def test_share_of_embedded_questions(codec: PromptCodec) -> None:
    record = Record("d", "q", "a")
    corpus = Corpus((record,), codec, 512, 64, embed_share=0.75)
    lengths = [len(corpus.example(record, i).prompt) for i in range(400)]
    assert np.mean(np.asarray(lengths) > 2) == pytest.approx(0.75, abs=0.01)


def test_plain_text_is_cut_and_its_end_answers(codec: PromptCodec) -> None:
    corpus = Corpus((Record("one two three. " * 400, None, None),), codec, 256, 64)
    pieces = corpus.pieces()
    assert len(pieces) >= 3
    example = corpus.example(pieces[0])
    assert len(example.prompt) <= 256
    assert len(example.answer) == 64


def test_a_corpus_needs_records(codec: PromptCodec) -> None:
    with pytest.raises(UserError, match="no records"):
        Corpus((), codec, 512, 64)

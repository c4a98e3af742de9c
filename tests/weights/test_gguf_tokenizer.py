"""Tokenizers out of GGUF settings: equal to the tokenizer whose tables they hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from apb_jax.errors import UserError
from apb_jax.weights.gguf_header import GGUFHeader
from apb_jax.weights.gguf_tokenizer import gguf_tokenizer

TEXTS = ("Hello world, 1234567 it's\n\n 5", "  two  spaces ", "é 你好，世界", "a\r\n\tb<s>c")


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    """The packaged model's byte-level tables as GGUF settings."""
    content = json.loads((ROOT / "apb_jax/tiny/tokenizer.json").read_text())
    vocabulary = dict(content["model"]["vocab"])
    vocabulary |= {added["content"]: added["id"] for added in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {added["content"] for added in content["added_tokens"] if added["special"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    settings = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocabulary["<s>"],
        "tokenizer.ggml.eos_token_id": vocabulary["</s>"],
        "tokenizer.chat_template": "{{ messages[0].content }}!",
    }
    return settings | changes


def header(settings: dict[str, Any]) -> GGUFHeader:
    return GGUFHeader(Path("m.gguf"), settings, {})


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_splits_equal_those_of_transformers(pre: str) -> None:
    """transformers' own builder from the same tables, where its normalisation does not differ."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    settings = byte_level(pre)
    mine = gguf_tokenizer(header(settings))
    assert mine is not None
    tables = {
        "tokenizer_type": "gpt2",
        "pre_tokenizer_type": pre,
        "tokens": settings["tokenizer.ggml.tokens"],
        "merges": settings["tokenizer.ggml.merges"],
        "token_type": settings["tokenizer.ggml.token_type"],
    }
    theirs, _ = convert_gguf_tokenizer("llama", tables)
    for text in TEXTS:
        words = mine.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert words == theirs.pre_tokenizer.pre_tokenize_str(text)
        assert mine.decode(mine.encode(text, add_special_tokens=False)) == text
    assert mine.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert (mine.encode("a")[0] == mine.bos_token_id) == (pre in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_pieces_are_those_of_the_library(prefix: bool) -> None:
    """Also of lines that begin with spaces: one space more in front, or none (``add_space_prefix``)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    text = (ROOT / "docs" / "log.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = reference.vocab_size()
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in range(count)
    ]
    settings = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [float(reference.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_tokenizer(header(settings if prefix else settings | {"tokenizer.ggml.add_space_prefix": False}))
    assert tokenizer is not None
    for line in [*text[:200], "é 你好 😀", "two  spaces", " one in front", "   three in front ", "\tand a tab", "\n x"]:
        if line:
            ids = tokenizer.encode(line, add_special_tokens=False)
            assert ids == reference.encode(line), line
            assert tokenizer.decode(ids) == line
    assert tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert'"),
        ({"tokenizer.ggml.pre": "dbrx"}, "tokenizer.ggml.pre='dbrx'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre=None"),
        ({"tokenizer.ggml.merges": ["no pair"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' twice"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id=1000000"),
        ({"tokenizer.ggml.token_type": [1]}, "1 values for"),
    ],
)
def test_refused_by_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        gguf_tokenizer(header(byte_level("gpt-2", **changes)))


def test_a_file_without_tokenizer_has_none() -> None:
    assert gguf_tokenizer(header({})) is None

"""A folder's tokenizer and the ids that end an answer, as they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import random_model
from prompt.families import CHATML, byte_level
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

import apb_jax
from apb_jax.errors import UserError
from apb_jax.weights.generation_config import read_stop_ids
from apb_jax.weights.tokenizer import check_tokenizer, load_tokenizer

LISTED = (2, 30, 95, 3, 4, 5, 6, 7, 8)
"""More than the eight that one granule of a decode program holds."""


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('{"bos_token_id": 1, "eos_token_id": [2, 30, 198], "pad_token_id": 2}', (2, 30, 198)),
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": null}', ()),
        ("{}", ()),
    ],
)
def test_generation_config_names_stop_ids(tmp_path: Path, text: str, ids: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_stop_ids(tmp_path) == ids
    assert read_stop_ids(tmp_path / "none") == ()


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}', '{"eos_token_id": [-1]}'])
def test_a_wrong_generation_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json (is no JSON|has eos_token_id)"):
        read_stop_ids(tmp_path)


def test_every_listed_id_stops() -> None:
    """The answer ends in front of whichever comes first; here each is made the first token that greedy takes."""
    model = replace(random_model(), stop_ids=LISTED)
    engine = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1))
    assert set(LISTED) <= set(engine.stop_ids)
    session = engine.prefill([engine.prompt(np.arange(1, 40), [9, 10, 11])])
    (free,) = session.generate(3, stop_ids=())
    for place, token in enumerate(free.tokens):
        for position in (0, len(LISTED)):
            others = [i for i in LISTED if i not in free.tokens]
            stops = [*others[:position], token, *others[position:]]
            (answer,) = session.generate(3, stop_ids=stops)
            assert answer.tokens == free.tokens[: free.tokens.index(token)]
            assert answer.finish_reason == "stop", place


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    """What transformers 5.13 made of a byte-level tokenizer.json under LlamaTokenizer."""
    tokenizer = byte_level()
    check_tokenizer(tokenizer, "here")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"turns 'The lighthouse is kept by Mary Quill.' into 'Thelighthouseiskept"):
        load_tokenizer(tmp_path)


def test_a_byte_level_file_under_llama_s_class(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    text = "The lighthouse is kept by Mary Quill.\n"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert loaded.chat_template == CHATML

"""Streaming text: the pieces joined are the whole answer, and none of them ends inside a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt.families import byte_level, mistral, space_level
from tokenizers import decoders

from apb_jax.prompt.codec import PromptCodec, make_codec
from apb_jax.prompt.stream import TextStream

TEXTS = [
    "light 💡👨‍👩‍👧 out",
    "灯塔由玛丽·奎尔看守。",
    "المنارة على الصخرة",
    "plain words .\n\n  and spaces ",
    "\ufffd!",
    "é",
]


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptCodec]:
    found = {"bytes": byte_level(), "spaces": space_level(), "mistral": mistral(tmp_path_factory.mktemp("mistral"))}
    found["other"] = byte_level()
    found["other"].backend_tokenizer.decoder = decoders.WordPiece()
    return {name: make_codec(tokenizer, "") for name, tokenizer in found.items()}


def pieces(codec: PromptCodec, ids: list[int], at_a_time: int) -> list[str]:
    stream = TextStream(codec)
    return [*(stream.push(ids[i : i + at_a_time]) for i in range(0, len(ids), at_a_time)), stream.end()]


@pytest.mark.parametrize("kind", ["bytes", "spaces", "mistral", "other"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(codecs: dict[str, PromptCodec], kind: str, text: str) -> None:
    codec = codecs[kind]
    ids = codec.encode(text).tolist()
    shown = pieces(codec, ids, 1)
    assert "".join(shown) == codec.decode(ids)
    if "\ufffd" not in text and kind != "other":
        assert all("\ufffd" not in piece for piece in shown)


@pytest.mark.parametrize("kind", ["bytes", "spaces", "mistral"])
def test_an_answer_cut_inside_a_character_keeps_its_end(codecs: dict[str, PromptCodec], kind: str) -> None:
    codec = codecs[kind]
    ids = codec.encode("light 💡").tolist()[:-1]
    *shown, last = pieces(codec, ids, 1)
    assert "".join(shown).strip() == "light"
    assert last
    assert set(last) == {"\ufffd"}
    assert "".join([*shown, last]) == codec.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "spaces", "mistral", "other"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids(codecs: dict[str, PromptCodec], kind: str, data: st.DataObject) -> None:
    """Also special tokens, single bytes that are no characters, and ids beyond the vocabulary."""
    codec = codecs[kind]
    size = len(codec.tokenizer)
    ids = data.draw(st.lists(st.integers(0, size + 2) | st.integers(0, min(size, 1100)), max_size=40))
    assert "".join(pieces(codec, ids, data.draw(st.integers(1, 20)))) == codec.decode(ids)


def test_memory_is_bounded(codecs: dict[str, PromptCodec]) -> None:
    """Broken bytes for ever: the byte decoder holds at most a character's."""
    codec = codecs["bytes"]
    stream = TextStream(codec)
    half = codec.encode("💡").tolist()[:1]
    shown = "".join(stream.push(half * 10) for _ in range(100))
    assert len(shown) >= 990
    assert not stream._pending
    assert shown + stream.end() == codec.decode(half * 1000)

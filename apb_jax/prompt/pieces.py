"""Parts of a prompt to token ids: a user's text never becomes a control token, no part gets a space of its own.

A tokenizer of the ``tokenizers`` library is data (its JSON). Two things are changed in a copy of it. Control tokens get
names that no text can spell. The space that SentencePiece-like tokenizers put in front of every text is left out, for
parts that do not begin the prompt.
"""

from __future__ import annotations

import json
import secrets
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from apb_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id of what steers a model: special tokens, and added tokens that its chat template writes."""
    source = str(tokenizer.chat_template or "")
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in source)
    }


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts in front of a text: usually begin-of-text, or none."""
    alone = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a")
    places = [at for at in range(len(framed)) if framed[at : at + len(alone)] == alone]
    return framed[: places[-1]] if places else []


class Pieces:
    """Encodes parts of a prompt. The tokenizer itself is left as it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._controls = control_tokens(tokenizer)
        self._variants: dict[tuple[bool, bool], Tokenizer] = {}

    def encode(self, text: str, *, control: bool, start: bool) -> np.ndarray:
        """Ids int32 of ``text``.

        Args:
            control: whether text that spells a control token is that token.
            start: whether the text is taken as a text of its own (the tokenizer may put a space in front).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has a lone surrogate ({text[error.start]!r} at character {error.start}), which UTF-8 cannot "
                "hold; decode its source as UTF-8"
            ) from error
        key = (control, start or not self._prefixes)
        if key not in self._variants:
            self._variants[key] = self._variant(*key)
        return np.asarray(self._variants[key].encode(text, add_special_tokens=False).ids, np.int32)

    def begins_with_control(self, text: str) -> bool:
        """Whether a template's text begins with a control token."""
        return text.startswith(tuple(self._controls))

    @cached_property
    def _data(self) -> Json:
        return json.loads(self._tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined,no-any-return]

    @cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer puts a space in front of a text."""
        return any(without_prefix(self._data[part]) != self._data[part] for part in ("normalizer", "pre_tokenizer"))

    def _variant(self, control: bool, start: bool) -> Tokenizer:
        data = self._data | {"truncation": None, "padding": None, "post_processor": None}
        if not start:
            data |= {part: without_prefix(data[part]) for part in ("normalizer", "pre_tokenizer")}
        if not control:
            nonce = secrets.token_hex(16)
            names = {token: f"\ufdd0{nonce}:{index}" for token, index in self._controls.items()}
            data |= {
                "added_tokens": [t | {"content": names.get(t["content"], t["content"])} for t in data["added_tokens"]],
                "model": renamed(data["model"], names),
            }
        return Tokenizer.from_str(json.dumps(data))


def without_prefix(part: Json | None) -> Json | None:
    """A normalizer or pre-tokenizer that adds no space in front."""
    if part is None:
        return None
    kind = part["type"]
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {name: [kept for kept in map(without_prefix, part[name]) if kept is not None]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if kind == "ByteLevel" else part


def renamed(model: Json, names: dict[str, str]) -> Json:
    """A model whose pieces have other names; merges that make or use them are gone. Ids stay."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
        model = model | {"vocab": [[names.get(piece, piece), score] for piece, score in vocabulary]}
    else:
        model = model | {"vocab": {names.get(piece, piece): index for piece, index in vocabulary.items()}}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not names.keys() & {a, b, a + b}]
    return model

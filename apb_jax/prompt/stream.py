"""Arriving ids to text, piece by piece: the pieces joined are the text of all ids, and no half character is shown."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from apb_jax.prompt.codec import PromptCodec

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
"""GPT-2's letters for bytes: printable ones stand for themselves, the others from U+0100 on."""


class TextStream:
    """``push(ids)`` gives the text that is certain by now, ``end()`` what is left. Its memory does not grow with them.

    Three families of decoders are known. Tokens that are bytes (GPT-2's): a character may be spread over tokens.
    Single-byte tokens beside whole words (SentencePiece's byte fallback): one bad byte spoils its whole run, so a run
    is shown when it is over. Tokens that are text. A decoder of another kind is shown whole at the end.
    """

    def __init__(self, codec: PromptCodec) -> None:
        self._codec = codec
        tokenizer = codec.tokenizer
        kinds = decoder_kinds(tokenizer.backend_tokenizer.decoder)  # type: ignore[attr-defined]
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        known = {"ByteLevel", "Fuse"} if self._utf8 else {"Metaspace", "ByteFallback", "Fuse", "Replace", "Strip left"}
        self._known = kinds <= known
        self._names = tokenizer.backend_tokenizer.id_to_token  # type: ignore[attr-defined]
        self._skipped = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._shown: list[int] = []
        """The ids just before ``_pending``: text may depend on whether it begins the answer, on nothing more."""
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids add, as far as later ids cannot change it; may be empty."""
        text = ""
        for index in ids:
            name: str | None = self._names(index)
            if index in self._skipped or name is None:
                continue
            if self._known and self._utf8:
                text += self._utf8.decode(token_bytes(name))
                continue
            self._pending.append(index)
            if self._known and not (self._fallback and _BYTE.fullmatch(name)):
                text += self._take()
        return text

    def end(self) -> str:
        """The rest, half characters as the replacement character."""
        return self._utf8.decode(b"", final=True) if self._known and self._utf8 else self._take()

    def _take(self) -> str:
        """What the pending ids add to the text of those before."""
        before, pending = self._shown, self._pending
        if not pending:
            return ""
        self._shown, self._pending = pending, []
        return self._codec.decode(before + pending)[len(self._codec.decode(before)) :]


def token_bytes(name: str) -> bytes:
    """The bytes of a byte-level token; an added token with other letters is its own text."""
    return bytes(_BYTE_OF[c] for c in name) if all(c in _BYTE_OF for c in name) else name.encode("utf-8")


def decoder_kinds(decoder: Any) -> set[str]:
    """The kinds of a decoder's steps; "Strip left" for a Strip that leaves the end alone."""

    def walk(part: dict[str, Any] | None) -> Iterable[str]:
        if part is None:
            return
        if part["type"] == "Sequence":
            for step in part["decoders"]:
                yield from walk(step)
        elif part["type"] == "Strip" and part["stop"] == 0:
            yield "Strip left"
        else:
            yield part["type"]

    return set(walk(None if decoder is None else json.loads(decoder.__getstate__())))

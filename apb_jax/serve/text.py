"""Arriving token ids to text that may be shown: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from apb_jax.prompt import PromptCodec

CONTEXT = 4
"""Ids decoded again in front of new ones: text may depend on what stands before."""


class TextStream:
    """``push(ids)`` gives the text that is certain by now, ``end()`` what is left."""

    def __init__(self, codec: PromptCodec) -> None:
        self._codec = codec
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids add; a character that is not whole waits."""
        self._pending += ids
        return "" if self._codec.decode(self._pending).endswith("\ufffd") else self.end()

    def end(self) -> str:
        """The rest, half characters as the replacement character."""
        whole, known = self._codec.decode(self._before + self._pending), self._codec.decode(self._before)
        self._before, self._pending = (self._before + self._pending)[-CONTEXT:], []
        return whole[len(known) :]


class StopStrings:
    """Cuts text before the first stop string that is complete, wherever the pieces were cut."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be no part of a stop string any more."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        ends = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)[1]]
        keep = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back for a stop string that did not come."""
        text, self._held = self._held, ""
        return "" if self.found else text

"""Text to token ids piece by piece, each piece remembered: samples are made of few pieces, said many times."""

from __future__ import annotations

from typing import Any

import numpy as np


class Encoder:
    """Text pieces to tokens without BOS: numbers digit by digit, every other piece encoded once and remembered."""

    def __init__(self, tokenizer: Any, limit: int = 300_000) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self._cache: dict[str, np.ndarray] = {}
        self._digits = np.zeros(128, np.int32)
        for digit in "0123456789":
            self._digits[ord(digit)] = tokenizer.encode(digit, add_special_tokens=False)[0]

    def __call__(self, piece: str) -> np.ndarray:
        """int32 [n]; exact for a text cut where the tokenizer cuts it too."""
        found = self._cache.get(piece)
        if found is None:
            if piece.isascii() and piece.isdigit():
                return self._digits[np.frombuffer(piece.encode("ascii"), np.uint8)]
            if len(self._cache) >= self.limit:
                self._cache.clear()
            found = np.asarray(self.tokenizer.encode(piece, add_special_tokens=False), np.int32)
            self._cache[piece] = found
        return found

"""Stop strings: text may be shown as far as no stop string can begin in it."""

from __future__ import annotations


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

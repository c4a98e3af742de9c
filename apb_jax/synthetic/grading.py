"""How answers about synthetic documents are judged, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re

VALUE = re.compile(r"\d+|\b[A-Z]{5}\b")


def is_correct(text: str, values: tuple[str, ...]) -> bool:
    """All values and no other number or variable name, in any order."""
    return set(VALUE.findall(text)) == set(values)


def wilson(correct: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of the share ``correct`` / ``count`` (Wilson 1927), 0..1.

    For scores between 0 and 1 (``correct`` their sum) it is an upper bound of the interval: none of the same mean
    varies more than scores of 0 and 1.
    """
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)

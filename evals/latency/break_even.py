"""From which length on a method's prefill is faster than another's."""

import itertools
import math
from collections.abc import Mapping

from evals.tables import length_name


def break_even(baseline: Mapping[int, float], other: Mapping[int, float]) -> str:
    """In words, from prefill seconds by length: where ``other`` begins to be faster than ``baseline``.

    Between two measured lengths the ratio is interpolated on logarithmic scales; nothing is said beyond them.
    """
    lengths = sorted(baseline.keys() & other.keys())
    if not lengths:
        return "not measured at any length of both"
    gains = [math.log(baseline[n] / other[n]) for n in lengths]
    if all(gain > 0 for gain in gains):
        return f"faster at every length measured, from {length_name(lengths[0])} on"
    if all(gain <= 0 for gain in gains):
        return f"faster at no length measured, up to {length_name(lengths[-1])}"
    turns = [place for place, (a, b) in enumerate(itertools.pairwise(gains)) if (a > 0) != (b > 0)]
    if len(turns) > 1 or gains[0] > 0:
        return "faster at " + ", ".join(length_name(n) for n, gain in zip(lengths, gains, strict=True) if gain > 0)
    (place,) = turns
    (low, high), (before, behind) = lengths[place : place + 2], gains[place : place + 2]
    at = low * (high / low) ** (-before / (behind - before))
    return f"faster from about {at:,.0f} tokens on (measured at {length_name(low)} and {length_name(high)})"

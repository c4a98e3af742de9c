"""How many units of haystack fit a length: the searches of the published programs, and an exact one.

Every probe builds a prompt and so draws from the random streams: the number of probes is part of the seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from evals.base import EvalError
from evals.tokens import TokenCounter


@dataclass(frozen=True)
class Draft:
    """A prompt under construction; ``sizing_extra`` is what the linear search counts on top of it."""

    document: str
    query: str
    references: tuple[str, ...]
    sizing_extra: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.document + self.query


class Maker(Protocol):
    """Builds prompts of one task family from a number of units (words, sentences, documents...).

    Attributes:
      step: units by which the published searches grow and shrink.
      cap: most units that exist, or None; a linear search stops there.
      cap_before_growth: essays are capped before the count grows, word lists and documents after.
      overhead_tokens: tokens of a worked example that is inserted after sizing.
    """

    step: int
    cap: int | None
    cap_before_growth: bool
    overhead_tokens: int

    def build(self, units: int) -> Draft: ...


@dataclass(frozen=True)
class Budget:
    """``length`` counts prompt plus answer, without special tokens."""

    length: int
    new_tokens: int
    count: TokenCounter


def linear(maker: Maker, budget: Budget) -> int:
    """Grow by ``step`` until the prompt with its answer no longer fits."""
    units, total = maker.step, 0
    while total + budget.new_tokens < budget.length:
        draft = maker.build(units)
        total = budget.count(draft.prompt + draft.sizing_extra) + maker.overhead_tokens
        if total + budget.new_tokens > budget.length:
            return units - maker.step
        if maker.cap is not None and maker.cap_before_growth and units > maker.cap:
            return maker.cap
        units += maker.step
        if maker.cap is not None and not maker.cap_before_growth and units > maker.cap:
            return maker.cap
    return units


def bisect(maker: Maker, budget: Budget, *, probe_units: int | None = None, slack: int = 3) -> int:
    """The main branch's search: an upper bound from one probe, then halving. The smallest answer is ``step``."""
    probe_units = probe_units or maker.step
    per_unit = budget.count(maker.build(probe_units).prompt) / probe_units
    bound = int(budget.length / per_unit * slack) if slack == 3 else int(budget.length // per_unit) * slack
    return _largest(maker, budget, maker.step, max(bound, 2 * maker.step)) or maker.step


def fit(maker: Maker, budget: Budget, smallest: int = 1) -> int:
    """Largest number of units that fits, to the unit: doubling, then halving."""
    upper = max(2 * smallest, maker.step)
    while _fits(maker, budget, upper):
        if maker.cap is not None and upper >= maker.cap:
            return maker.cap
        upper *= 2
    upper = upper if maker.cap is None else min(upper, maker.cap)
    best = _largest(maker, budget, smallest, upper)
    if best is None:
        need = budget.count(maker.build(smallest).prompt) + maker.overhead_tokens + budget.new_tokens
        raise EvalError(f"length {budget.length} is too short: the smallest prompt with its answer needs {need} tokens")
    return best


def apb_bisect(maker: Maker, budget: Budget, *, upper: int, keeps_last: bool) -> int:
    """APB's half-open search for lengths above 131072."""
    lower, middle, total = maker.step, maker.step, 0
    while lower < upper:
        middle = (lower + upper) // 2
        draft = maker.build(middle)
        total = budget.count(draft.prompt + " ".join(draft.references)) + maker.overhead_tokens + budget.new_tokens
        if total == budget.length:
            return middle
        if total < budget.length:
            lower = middle + 1
        else:
            upper = middle
    if keeps_last and total <= budget.length:
        return middle
    return middle - maker.step


def draw(
    maker: Maker,
    budget: Budget,
    units: int,
    *,
    shrink: int,
    smallest: int = 1,
    finish: Callable[[Draft], Draft] = lambda draft: draft,
    finish_before_check: bool = False,
    attempts: int = 200,
) -> tuple[Draft, int]:
    """One sample that fits: ``(draft, tokens of prompt plus answer)``; every retry draws new random values.

    The originals retry for ever; this gives up with an EvalError. They also shrink a list of 14 words, ten of
    them common, to four; this stops at ``smallest`` units.
    """
    length, used, at_smallest = 0, units, 0
    for _ in range(attempts):
        draft = maker.build(used)
        if finish_before_check:
            draft = finish(draft)
            length = budget.count(draft.prompt) + budget.new_tokens
        else:
            length = budget.count(draft.prompt) + maker.overhead_tokens + budget.new_tokens
        if length <= budget.length:
            return (draft if finish_before_check else finish(draft)), length
        if shrink and used > max(shrink, smallest):
            used = max(used - shrink, smallest)
        else:
            at_smallest += 1
            if at_smallest > 20:
                break
    raise EvalError(
        f"no sample fits length {budget.length}: the last of {attempts} tries has {length} tokens with "
        f"{used} units; use a longer length or variant 'ruler_fit'"
    )


def draw_filled(
    maker: Maker,
    budget: Budget,
    units: int,
    *,
    smallest: int = 1,
    finish: Callable[[Draft], Draft] = lambda draft: draft,
    attempts: int = 24,
) -> tuple[Draft, int]:
    """One sample that fits and leaves at most 1% (or 32 tokens) of the length unused.

    Random words differ in tokens, so the size found once is corrected for each sample. If no try comes that
    close, the fullest that fits is taken.
    """
    slack = max(32, budget.length // 100)
    used, best = units, None
    for _ in range(attempts):
        draft = finish(maker.build(used))
        length = budget.count(draft.prompt) + budget.new_tokens
        room = budget.length - length
        if room >= 0 and (best is None or length > best[1]):
            best = (draft, length)
        if 0 <= room <= slack:
            break
        per_unit = max(1.0, length / used)
        # Aim at the middle of the slack: the next draw varies again.
        change = round((room - slack / 2) / per_unit)
        used = max(smallest, used + (change or (1 if room > 0 else -1)))
        if maker.cap is not None:
            used = min(used, maker.cap)
    if best is None:
        raise EvalError(f"no sample fits length {budget.length}: the last of {attempts} tries has {length} tokens")
    return best


def _fits(maker: Maker, budget: Budget, units: int) -> bool:
    tokens = budget.count(maker.build(units).prompt) + maker.overhead_tokens
    return tokens + budget.new_tokens <= budget.length


def _largest(maker: Maker, budget: Budget, lower: int, upper: int) -> int | None:
    best = None
    while lower <= upper:
        middle = (lower + upper) // 2
        if _fits(maker, budget, middle):
            best, lower = middle, middle + 1
        else:
            upper = middle - 1
    return best

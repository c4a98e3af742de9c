"""Needle-in-a-haystack prompts: one or several keys, values and questions in noise, essays or other needles."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from evals.base import EvalError
from evals.ruler.atoms import NOISE, Draws
from evals.ruler.corpus import Essays
from evals.ruler.prompt import Form
from evals.ruler.sizing import Draft

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

# Forty depths in percent at which RULER puts needles into essays.
DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))


@dataclass(frozen=True)
class NiahSpec:
    """Parameters of a needle task; ``queries`` keys are asked at once, every key has ``values`` values."""

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __post_init__(self) -> None:
        for name in ("keys", "values", "queries"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keys < self.queries:
            object.__setattr__(self, "keys", self.queries)
        if self.haystack == "essay" and self.keys * self.values > len(DEPTHS):
            raise EvalError(f"an essay haystack has {len(DEPTHS)} depths, got {self.keys * self.values} needles")

    @property
    def single(self) -> bool:
        """One key, one value asked: the wording turns singular."""
        return self.queries * self.values == 1


class NiahMaker:
    """Builds needle prompts. A unit is a word of the essays, a noise sentence or a needle sentence."""

    overhead_tokens = 0
    cap_before_growth = True

    def __init__(
        self,
        spec: NiahSpec,
        form: Form,
        draws: Draws,
        *,
        length: int,
        essays: Essays | None,
        repeats_essays: bool,
    ):
        self._spec, self._form, self._draws, self._essays = spec, form, draws, essays
        self._repeats_essays = repeats_essays
        self.cap = None
        if spec.haystack == "essay":
            if essays is None:
                raise EvalError("an essay haystack needs the essays")
            self.step = 500
            if not repeats_essays:
                self.cap = len(essays.words)
        else:
            self.step = 25 if length >= 4096 else 5

    def build(self, units: int) -> Draft:
        spec, draws = self._spec, self._draws
        keys, values, needles = [], [], []
        for _ in range(spec.keys):
            keys.append(draws.atom(spec.key))
            values.append([draws.atom(spec.value) for _ in range(spec.values)])
            needles += [NEEDLE.format(kind=spec.value, key=keys[-1], value=value) for value in values[-1]]
        needles = draws.shuffled(needles)
        context = self._in_essay(units, needles) if spec.haystack == "essay" else self._in_list(units, needles)

        asked = draws.py.sample(range(spec.keys), spec.queries)
        names = [keys[i] for i in asked]
        references = tuple(value for i in asked for value in values[i])
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
        kind = spec.value[:-1] if spec.single else spec.value
        document = self._form.document(type_needle_v=kind, context=context)
        depths = [round(document.find(value) / len(document), 4) for value in references]
        return Draft(
            document=document,
            query=self._form.query(type_needle_v=kind, query=query),
            references=references,
            sizing_extra=" ".join(references),
            info={"depths": depths},
        )

    def _in_essay(self, words: int, needles: list[str]) -> str:
        assert self._essays is not None  # the constructor refuses an essay haystack without them
        sentences = self._essays.sentences(words, repeat=self._repeats_essays)
        depths = self._draws.py.sample(DEPTHS, len(needles))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        pieces, start = [], 0
        for place, needle in zip(places, needles, strict=True):
            pieces += [" ".join(sentences[start:place]), needle]
            start = place
        return " ".join([*pieces, " ".join(sentences[start:])])

    def _in_list(self, count: int, needles: list[str]) -> str:
        spec, draws = self._spec, self._draws
        if count < len(needles):
            raise EvalError(f"{len(needles)} needles do not fit a haystack of {count} sentences: use a longer length")
        if spec.haystack == "noise":
            lines = [NOISE] * count
        else:
            lines = []
            for _ in range(count):
                key = draws.atom(spec.key)
                lines.append(NEEDLE.format(kind=spec.value, key=key, value=draws.atom(spec.value)))
        for place, needle in zip(
            sorted(draws.py.sample(range(count), len(needles)), reverse=True), needles, strict=True
        ):
            lines.insert(place, needle)
        return "\n".join(lines)

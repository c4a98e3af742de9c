"""Variable tracking: a chain of assignments hidden in noise; all names with the value are asked."""

import string
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from evals.base import EvalError
from evals.ruler.atoms import NOISE, Draws
from evals.ruler.prompt import Form
from evals.ruler.sizing import Budget, Draft, Maker, bisect, draw, fit, linear

HOPS = 4
EXAMPLE_LENGTH = 500
EXAMPLE_VALUE = "12345"


class VtMaker:
    """Builds variable tracking prompts without their worked example. A unit is a noise sentence."""

    cap: int | None = None
    cap_before_growth = False
    overhead_tokens = 0

    def __init__(
        self,
        form: Form,
        draws: Draws,
        *,
        step: int,
        own_lines: bool,
        names: int = 5,
        value: str | None = None,
    ):
        self.step = step
        self._form, self._draws, self._own_lines = form, draws, own_lines
        self._name_length, self._value = names, value

    def build(self, units: int) -> Draft:
        draws = self._draws
        names: list[str] = []
        while len(names) < HOPS + 1:
            name = draws.letters(string.ascii_uppercase, self._name_length)
            if name not in names:
                names.append(name)
        value = self._value or str(draws.np.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {after} = VAR {before} " for before, after in pairwise(names)]

        sentences = [NOISE if self._own_lines else NOISE + "\n"] * units
        if len(sentences) <= len(chain):  # too few places: put the chain between single sentences
            parts = [part for unit in sentences for part in unit.split(".")]
            sentences = [part + "." if part.strip() else part for part in parts]
        if len(sentences) < len(chain):
            raise EvalError(f"{units} noise sentences hold no chain of {len(chain)} assignments; use a longer length")
        places = sorted(draws.py.sample(range(len(sentences)), len(chain)))
        for inserted, (place, sentence) in enumerate(zip(places, chain, strict=True)):
            sentences.insert(place + inserted, sentence)
        context = ("\n" if self._own_lines else " ").join(sentences).replace(". \n", ".\n")

        document = self._form.document(context=context)
        depths = [round(document.find(f"VAR {name} =") / len(document), 4) for name in names]
        return Draft(
            document=document,
            query=self._form.query(query=value, num_v=HOPS + 1),
            references=tuple(names),
            sizing_extra=f" {names}",
            info={"depths": depths},
        )


class WorkedExample:
    """The solved example in front of every variable tracking prompt, with its rules of insertion and renaming."""

    def __init__(
        self,
        style: Literal["flat", "split", "lines"],
        form: Form,
        draws: Draws,
        *,
        budget: Budget,
        exact: bool,
    ):
        own_lines = style == "lines"
        self._style, self._draws = style, draws
        self._head_length = len(form.head.format())
        maker = VtMaker(
            _example_form(style, form),
            draws,
            step=5,
            own_lines=own_lines,
            names=3,
            value=EXAMPLE_VALUE if own_lines else None,
        )
        small = Budget(EXAMPLE_LENGTH, 0 if own_lines else budget.new_tokens, budget.count)
        if exact:
            # With a tokenizer of small tokens the example's 500 cannot be met: its smallest form then stands.
            units = fit(maker, small, smallest=5) if _smallest_fits(maker, small) else 5
            draft = maker.build(units)
        else:
            units = bisect(maker, small) if own_lines else linear(maker, small)
            draft, _ = draw(maker, small, units, shrink=5 if own_lines else 0)
        self._names = draft.references
        self._text = f"{draft.prompt} {' '.join(draft.references)}" + ("\n" if own_lines else "\n\n")
        self.tokens = budget.count(self._text)

    def insert(self, draft: Draft) -> Draft:
        """Put the example, renamed where the variant renames, between the wrapper head and the task text."""
        text = self._text
        if self._style != "flat":
            # The question and the answer list are renamed with the chain: every mention is.
            for name in self._names:
                text = text.replace(name, self._draws.letters(string.ascii_uppercase, len(name)))
        if self._style == "lines":
            text = text.replace(EXAMPLE_VALUE, str(self._draws.np.randint(10000, 99999))) + "\n"
        else:
            text = f" {text}\n\n"
        cut = self._head_length
        return replace(draft, document=draft.document[:cut] + text + draft.document[cut:])


def _smallest_fits(maker: Maker, budget: Budget) -> bool:
    return budget.count(maker.build(5).prompt) + budget.new_tokens <= budget.length


def _example_form(style: str, form: Form) -> Form:
    """The example's template: the originals flatten its white space and lose a word (see the README)."""
    if style == "lines" or (style == "split" and not form.head and not form.tail):
        return replace(form, head="", tail="")
    if style == "flat":
        flat = " ".join((form.context + form.question + form.tail).split()[:-1])
        cut = flat.index("{context}") + len("{context}")
        return Form("", flat[:cut], flat[cut:], "", form.answer_prefix)
    context = " ".join(form.context.split()) + " "
    question = " ".join((form.question + form.tail).split()[:-1])
    return Form("", context, question, "", form.answer_prefix)

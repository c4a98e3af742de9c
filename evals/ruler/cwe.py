"""Common words extraction: the ten words that appear most often in a numbered list."""

from collections.abc import Sequence

from evals.base import EvalError
from evals.ruler.atoms import Draws, word_vocabulary
from evals.ruler.prompt import Form
from evals.ruler.sizing import Draft

COMMON = 10


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


class CweMaker:
    """Builds prompts of a solved example list and the real list. A unit is a distinct word of the real list."""

    step = 10
    cap_before_growth = False
    overhead_tokens = 0

    def __init__(
        self,
        form: Form,
        draws: Draws,
        *,
        length: int,
        frequencies: tuple[int, int],
        separator: str,
        more_words: Sequence[str] | None,
    ):
        self._form, self._draws, self._separator = form, draws, separator
        self._vocabulary, self._more_words = word_vocabulary(draws.seed), more_words
        self.cap: int | None = len(self._vocabulary if more_words is None else more_words)
        self._example = (40, 10, 3) if length >= 4096 else (20, 3, 1)
        self._frequencies = frequencies if length >= 4096 else (6, 1)

    def build(self, units: int) -> Draft:
        if units < COMMON:
            raise EvalError(
                f"common words needs at least {COMMON} distinct words, the length leaves room for {units}: "
                f"{self._frequencies[0]} repetitions of each do not fit; use a longer length"
            )
        example, example_answer = self._list(*self._example)
        words, answer = self._list(units, *self._frequencies)
        solved = (
            self._form.document(context=example)
            + self._form.query(query="")
            + self._separator
            + numbered(example_answer)
            + "\n"
        )
        return Draft(
            document=solved + self._form.document(context=words),
            query=self._form.query(query=""),
            references=tuple(answer),
            sizing_extra=" " + numbered(answer),
            info={"distinct_words": units},
        )

    def _list(self, distinct: int, common_times: int, other_times: int) -> tuple[str, list[str]]:
        source: Sequence[str] = self._vocabulary
        if distinct > len(source):
            if self._more_words is None:
                raise EvalError(
                    f"common words asks for {distinct} distinct words and wonderwords has {len(source)}: put "
                    "english_words.json into --data DIR (see `python -m evals data`)"
                )
            source = self._more_words
        words = self._draws.py.sample(source, distinct)
        common, others = words[:COMMON], words[COMMON:]
        return numbered(self._draws.shuffled(common * common_times + others * other_times)), common

"""The 13 RULER tasks (and a pass key) as streams of examples for any tokenizer, length and variant."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evals.base import EvalError, Example, require_choice
from evals.ruler import corpus, sizing
from evals.ruler.atoms import Draws
from evals.ruler.cwe import COMMON, CweMaker
from evals.ruler.fwe import FweMaker
from evals.ruler.niah import NiahMaker, NiahSpec
from evals.ruler.passkey import PasskeyMaker
from evals.ruler.prompt import Form, make_form
from evals.ruler.qa import FilledQaMaker, QaMaker
from evals.ruler.scoring import METRICS, score_one
from evals.ruler.sizing import Budget, Draft
from evals.ruler.variants import Variant, get_variant
from evals.ruler.vt import VtMaker, WorkedExample
from evals.tokens import TokenCounter, token_counter

NIAH = {
    "niah_single_1": NiahSpec("noise"),
    "niah_single_2": NiahSpec("essay"),
    "niah_single_3": NiahSpec("essay", value="uuids"),
    "niah_multikey_1": NiahSpec("essay", keys=4),
    "niah_multikey_2": NiahSpec("needle"),
    "niah_multikey_3": NiahSpec("needle", key="uuids", value="uuids"),
    "niah_multivalue": NiahSpec("essay", values=4),
    "niah_multiquery": NiahSpec("essay", queries=4),
}
TASKS = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")
EXTRA_TASKS = ("passkey",)

# Answer budgets that count towards the length.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32, "passkey": 16}

_QUESTION_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}


def family_of(task: str | NiahSpec) -> str:
    return "niah" if isinstance(task, NiahSpec) or task in NIAH else task.split("_")[0]


def needed_text(task: str | NiahSpec) -> str | None:
    """Which text of ``--data`` a task reads (``essays``, ``squad``, ``hotpotqa``), or None."""
    if isinstance(task, NiahSpec) or task in NIAH:
        spec = NIAH[task] if isinstance(task, str) else task
        return "essays" if spec.haystack == "essay" else None
    return _QUESTION_FILES.get(task)


@dataclass(frozen=True)
class RulerTask:
    """One task at one length.

    Attributes:
      task: a name of TASKS or EXTRA_TASKS, or a NiahSpec with parameters of your own.
      tokenizer: anything ``evals.tokens.token_counter`` accepts.
      length: tokens of prompt plus answer budget, without special tokens.
      samples: number of examples.
      variant: which published program to follow (see ``evals.ruler.variants``).
      wrapper: chat wrapper (see ``evals.ruler.prompt.wrapper_names``).
      data: folder with the essays and question files; only tasks that read them need it.
      splitter: sentence splitter for essays, ``untrained`` or ``english`` (NLTK's punkt model).
      keep_wrapper_grammar: do not let the singular rewriting touch the chat wrapper.
    """

    task: str | NiahSpec
    tokenizer: Any
    length: int
    samples: int = 500
    seed: int = 42
    variant: str = "ruler_main"
    wrapper: str = "base"
    data: str | Path | None = None
    splitter: str = "untrained"
    keep_wrapper_grammar: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.task, str):
            require_choice("RULER task", self.task, (*TASKS, *EXTRA_TASKS))
        get_variant(self.variant)
        require_choice("sentence splitter", self.splitter, corpus.SPLITTERS)
        for name in ("length", "samples"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} must be at least 1, got {getattr(self, name)}")
        make_form(self.family, wrapper=self.wrapper)
        if self._text is not None:
            path = corpus.find(self.data, self._text)
            if self._text != "essays":
                held = len(corpus.load_questions(self._text, path).questions)
                if self.samples > held:
                    raise EvalError(
                        f"{self.name}: {self.samples} samples asked, {path.name} holds {held} questions with an "
                        f"answer; use --samples {held}"
                    )

    @property
    def name(self) -> str:
        return self.task if isinstance(self.task, str) else "niah_custom"

    @property
    def family(self) -> str:
        return family_of(self.task)

    @property
    def metric(self) -> str:
        return METRICS[self.family]

    @property
    def new_tokens(self) -> int:
        """Tokens generated at inference (frequent words: more than its sizing reserves in one variant)."""
        return self._variant.fwe_new_tokens if self.family == "fwe" else NEW_TOKENS[self.family]

    @property
    def _variant(self) -> Variant:
        return get_variant(self.variant)

    @property
    def _text(self) -> str | None:
        return needed_text(self.task)

    @cached_property
    def _count(self) -> TokenCounter:
        return token_counter(self.tokenizer)

    def score(self, example: Example, text: str) -> float:
        return score_one(self.metric, text, example.references)

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "variant": self.variant,
            "variant_source": self._variant.source,
            "wrapper": self.wrapper,
            "seed": self.seed,
            "metric": self.metric,
            "max_new_tokens": self.new_tokens,
        }
        if self._text is not None:
            path = corpus.find(self.data, self._text)
            facts["data"] = {"file": path.name, "sha256": corpus.sha256(path)}
        words = self._more_words()
        if words is not None:
            facts["data"] = {"file": words.name, "sha256": corpus.sha256(words)}
        if self._text == "essays":
            facts["sentence_splitter"] = self.splitter
        return facts

    def examples(self) -> Iterator[Example]:
        """Yield the samples in order; one is in memory at a time."""
        draws = Draws(self.seed)
        source = {"fwe": self._fwe, "qa": self._qa, "vt": self._vt}.get(self.family, self._plain)
        try:
            for index, (draft, tokens) in enumerate(source(draws)):
                yield Example(
                    id=str(index),
                    document=draft.document,
                    query=draft.query,
                    references=draft.references,
                    max_new_tokens=self.new_tokens,
                    info={**draft.info, "length": tokens},
                )
        except EvalError as error:
            raise EvalError(f"{self.name} at {self.length}, {self.variant}: {error}") from error

    # -- one source of (draft, tokens of prompt plus answer) per family -------------------------------------------

    def _form(self) -> Form:
        return make_form(
            self.family,
            wrapper=self.wrapper,
            corrected_spelling=self._variant.corrected_spelling,
            singular=self.family == "niah" and self._spec.single,
            keep_wrapper_grammar=self.keep_wrapper_grammar,
        )

    @property
    def _spec(self) -> NiahSpec:
        return NIAH[self.task] if isinstance(self.task, str) else self.task

    def _budget(self) -> Budget:
        return Budget(self.length, NEW_TOKENS[self.family], self._count)

    def _plain(self, draws: Draws) -> Iterator[tuple[Draft, int]]:
        makers: dict[str, Callable[[Draws], sizing.Maker]] = {
            "niah": self._niah_maker,
            "cwe": self._cwe_maker,
            "passkey": self._passkey_maker,
        }
        maker = makers[self.family](draws)
        smallest, probe = self._needles(), None
        if self.family == "cwe":
            smallest, probe = COMMON, 4096
        units = self._size(maker, smallest=smallest, probe=probe, upper=maker.cap or self.length)
        for _ in range(self.samples):
            yield self._draw(maker, units, smallest)

    def _needles(self) -> int:
        return self._spec.keys * self._spec.values if self.family == "niah" else 1

    def _niah_maker(self, draws: Draws) -> NiahMaker:
        essays = None
        if self._text == "essays":
            essays = corpus.load_essays(corpus.find(self.data, "essays"), self.splitter)
        return NiahMaker(
            self._spec,
            self._form(),
            draws,
            length=self.length,
            essays=essays,
            repeats_essays=self._variant.repeats_texts,
        )

    def _cwe_maker(self, draws: Draws) -> CweMaker:
        words = self._more_words()
        more = None if words is None else corpus.load_english_words(words)
        return CweMaker(
            self._form(),
            draws,
            length=self.length,
            frequencies=self._variant.cwe_frequencies,
            separator=self._variant.cwe_separator,
            more_words=more,
        )

    def _more_words(self) -> Path | None:
        """The main branch's further words for common words extraction, where the data folder holds them."""
        if self.family != "cwe" or not self._variant.repeats_texts or self.data is None:
            return None
        paths = [Path(self.data) / name for name in corpus.FILES["english_words"]]
        return next((path for path in paths if path.is_file()), None)

    def _passkey_maker(self, draws: Draws) -> PasskeyMaker:
        return PasskeyMaker(self._form(), draws)

    def _vt(self, draws: Draws) -> Iterator[tuple[Draft, int]]:
        form, variant, budget = self._form(), self._variant, self._budget()
        exact = variant.sizing == "fit"
        example = WorkedExample(variant.vt_example, form, draws, budget=budget, exact=exact)
        own_lines = variant.vt_example == "lines"
        step = 5 if own_lines and self.length < 4096 else 10
        maker = VtMaker(form, draws, step=step, own_lines=own_lines)
        maker.overhead_tokens = example.tokens
        units = self._size(maker, smallest=5, probe=None, upper=60000)
        for _ in range(self.samples):
            if exact:
                yield sizing.draw_filled(maker, budget, units, smallest=5, finish=example.insert)
            else:
                shrink = step if variant.vt_retry_shrinks else 0
                yield sizing.draw(
                    maker, budget, units, shrink=shrink, finish=example.insert, finish_before_check=own_lines
                )

    def _qa(self, draws: Draws) -> Iterator[tuple[Draft, int]]:
        kind = _QUESTION_FILES[self.name]
        questions = corpus.load_questions(kind, corpus.find(self.data, kind))
        variant = self._variant
        maker: QaMaker
        if variant.qa_fills_with_part:
            maker = FilledQaMaker(self._form(), draws, questions)
        else:
            copies = variant.squad_copies if kind == "squad" else 1
            maker = QaMaker(self._form(), draws, questions, copies=copies, repeats=variant.repeats_texts)
        # Sized with the first question, as in the published programs; the exact variant corrects each sample.
        units = self._size(maker, smallest=1, probe=None, upper=maker.cap or 0)
        made = 0
        for maker.question in range(len(questions.questions)):
            if made == self.samples:
                return
            try:
                sample = self._draw(maker, units, 1)
            except EvalError:
                # Only where a part of a document fills the length may a question be too long for it: the next one.
                if not variant.qa_fills_with_part or maker.question + 1 == len(questions.questions):
                    raise
                continue
            made += 1
            yield sample

    def _fwe(self, draws: Draws) -> Iterator[tuple[Draft, int]]:
        variant = self._variant
        new_tokens = NEW_TOKENS["fwe"]
        max_tokens = self.length - (new_tokens if variant.fwe_reserves_answer else 0)
        measured: Callable[[Draft], int]
        if variant.split:
            measured = lambda draft: self._count(draft.document)  # noqa: E731
        else:
            measured = lambda draft: self._count(draft.prompt)  # noqa: E731
        maker = FweMaker(self._form(), draws, max_tokens=max_tokens, count=measured)
        exact = variant.sizing == "fit"
        _, words = maker.build(exact=exact)
        for _ in range(self.samples):
            draft, _ = maker.build(None if exact else words, exact=exact)
            yield draft, self._count(draft.prompt) + new_tokens

    def _draw(self, maker: sizing.Maker, units: int, smallest: int) -> tuple[Draft, int]:
        if self._variant.sizing == "fit":
            return sizing.draw_filled(maker, self._budget(), units, smallest=smallest)
        return sizing.draw(maker, self._budget(), units, shrink=maker.step, smallest=smallest)

    def _size(self, maker: sizing.Maker, *, smallest: int, probe: int | None, upper: int) -> int:
        budget = self._budget()
        if self._variant.sizing == "fit":
            return sizing.fit(maker, budget, smallest)
        if self._variant.sizing == "bisect":
            return sizing.bisect(maker, budget, probe_units=probe, slack=2 if probe else 3)
        if self._variant.split and self.length > 131072:
            return sizing.apb_bisect(maker, budget, upper=upper, keeps_last=self.family == "qa")
        return sizing.linear(maker, budget)


def generate(task: str | NiahSpec, tokenizer: Any, length: int, samples: int, **options: Any) -> Iterator[Example]:
    """Stream examples of a task: shorthand for ``RulerTask(task, tokenizer, length, samples, ...).examples()``."""
    return RulerTask(task, tokenizer, length, samples, **options).examples()

"""What a benchmark and a system under test owe each other: Example, Completion, Generator, LogProbs, Task.

A benchmark never sees a model, a model never sees a benchmark: a Task yields Examples, a Generator answers
them, and the Task scores the answers. Both sides are protocols, so any object with the right methods will do.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from apb_jax.errors import UserError
from apb_jax.joining import Joining
from apb_jax.precision import Precision


class EvalError(UserError):
    """The input is wrong: one line that names the value, the rule and the nearest legal choice."""


UNSCORABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a scorer raises for an answer or a reference of a form that it does not know."""


def text_facts(name: str, text: str) -> dict[str, str]:
    """A text by name and hash: a run may be continued, or shown beside another, only on equal contents."""
    return {"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def require_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise raise EvalError naming the nearest one."""
    legal = list(choices)
    if value in legal:
        return value
    near = difflib.get_close_matches(value, legal, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise EvalError(f"unknown {what} {value!r}{hint} (one of: {', '.join(legal)})")


@dataclass(frozen=True)
class Example:
    """One question about one document.

    Attributes:
      id: unique within its task; the order of a run is the order in which examples are yielded.
      document: everything up to the question, chat wrapper head and worked examples included.
      query: the question, chat wrapper tail and answer prefix; the prompt is ``document + query``.
      references: the accepted or expected answers (their meaning is the task's metric).
      max_new_tokens: the answer budget in tokens.
      info: facts about the sample worth keeping beside its score (length in tokens, depth, gold rank).
      label: the reference in the form the scorer takes, where that is not a tuple of strings.
      embedded_query: what APB places with its anchor, where that is not the query itself.
    """

    id: str
    document: str
    query: str
    references: tuple[str, ...]
    max_new_tokens: int
    info: Mapping[str, Any] = field(default_factory=dict)
    label: Any = None
    embedded_query: str | None = None

    def __post_init__(self) -> None:
        if not self.references or any(not str(reference).strip() for reference in self.references):
            raise EvalError(f"example {self.id}: references must be non-empty strings, got {self.references!r}")
        if self.max_new_tokens < 1:
            raise EvalError(f"example {self.id}: max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def prompt(self) -> str:
        return self.document + self.query


@dataclass(frozen=True)
class Completion:
    """What a Generator answered. Times are seconds measured around finished device work, or None.

    ``facts`` says what really ran where that is decided per prompt: a method's budgets, dense layers, a fallback.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float | None = None
    decode_s: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Generator(Protocol):
    """A system under test."""

    @property
    def max_length(self) -> int | None:
        """Most tokens (prompt and answer) the model has positions for; None if unbounded."""

    def count(self, text: str) -> int:
        """Number of tokens of ``text``, no special tokens added."""

    def generate(
        self,
        document: str,
        query: str,
        max_new_tokens: int,
        *,
        embedded_query: str | None = None,
        ignore_stop: bool = False,
    ) -> Completion:
        """Answer greedily; ``text`` holds the new tokens only. ``ignore_stop``: always ``max_new_tokens`` of them."""

    def describe(self) -> dict[str, Any]:
        """JSON facts for config.json: model, method and its options, dense layers or heads, dtype, device, versions."""


@runtime_checkable
class Prefiller(Protocol):
    """A system whose prefill can be timed alone."""

    def prefill_alone(self, document: str, query: str) -> Completion:
        """The document through all layers, no KV kept, nothing answered; ``prefill_s`` is what it took."""


@runtime_checkable
class BatchGenerator(Generator, Protocol):
    """A system that answers several examples together, each as it would alone."""

    def generate_batch(self, examples: Sequence[Example]) -> list[Completion]:
        """The completions of ``generate``, in order; times are of the examples served together."""


@dataclass(frozen=True)
class Scored:
    """Natural log-probabilities [n] of given tokens; ``greedy``: each was the likeliest; ``facts`` as in Completion."""

    log_probs: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)
    greedy: bool | None = None


class LogProbs(Protocol):
    """A system that can score given tokens."""

    @property
    def max_length(self) -> int | None: ...

    def log_probs(self, document: Sequence[int], segment: Sequence[int]) -> Scored:
        """Score each segment token after all tokens that stand before it."""

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SystemSpec:
    """Which model on which devices; ``options`` maps a method to its ``--set`` values."""

    model: str
    methods: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    weights: str | None
    heads: str | None
    dtype: str | None
    sp: int | None
    tp: int
    shards: int | None = None
    length: int | None = None
    """Tokens of the longest prompt: what method "auto" is chosen for."""
    joining: Joining = field(default_factory=Joining)
    """How this process joins a run of several."""
    precision: Precision = field(default_factory=Precision)
    """In which types the engine holds and multiplies."""


class Task(Protocol):
    """A benchmark at one length: a deterministic stream of examples and the rule that scores them."""

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str:
        """What a score means, in a word."""

    @property
    def length(self) -> int:
        """Most tokens of prompt and answer."""

    def examples(self) -> Iterator[Example]:
        """Yield the examples one at a time, the same ones on every call."""

    def score(self, example: Example, text: str) -> float:
        """Score of one answer, 0..1."""

    def describe(self) -> dict[str, Any]:
        """JSON facts for config.json: variant, template, seed, data files and their hashes, scoring rule."""


def mean_percent(scores: Sequence[float]) -> float:
    """Plain mean x 100, two decimals: the number every table here shows."""
    if not scores:
        raise EvalError("no samples to average: the file or run holds none of this task")
    return round(100 * sum(scores) / len(scores), 2)

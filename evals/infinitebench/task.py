"""The twelve InfiniteBench tasks as streams of examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.base import EvalError, Example, require_choice
from evals.infinitebench.prompts import SETS, cut_middle, fields_of, make_prompt
from evals.infinitebench.records import HUB_NAME, NEW_TOKENS, TASKS, checked, read_records
from evals.infinitebench.scoring import RULES, score_one
from evals.tokens import Tokens


@dataclass(frozen=True)
class InfiniteBenchTask:
    """One task; prompts longer than ``length`` lose their middle.

    Attributes:
      name: one of TASKS.
      length: tokens of prompt plus answer (no special tokens).
      data: folder with ``<task>.jsonl``, or None for the Hub.
      template: one of ``prompts.SETS``.
      rule: one of ``scoring.RULES``; ``minference`` also brings its larger answer budgets.
    """

    name: str
    tokens: Tokens
    length: int
    data: str | Path | None = None
    template: str = "yarn"
    rule: str = "official"

    def __post_init__(self) -> None:
        require_choice("InfiniteBench task", self.name, TASKS)
        require_choice("template set", self.template, SETS)
        require_choice("scoring rule", self.rule, RULES)
        if self.data is not None and not Path(self.data).is_dir():
            raise EvalError(f"--data {self.data}: no such folder (`python -m evals data` says what belongs into it)")
        if self._file is not None:
            if not self._file.is_file():
                raise EvalError(f"--data {self.data}: {self.name}.jsonl not there (see `python -m evals data`)")
            checked(self.name, self._file, fields_of)

    @property
    def _file(self) -> Path | None:
        return None if self.data is None else Path(self.data) / f"{self.name}.jsonl"

    @property
    def metric(self) -> str:
        return f"{self.rule} rule"

    @property
    def max_new_tokens(self) -> int:
        return NEW_TOKENS[self.name][1 if self.rule == "minference" else 0]

    def score(self, example: Example, text: str) -> float:
        return score_one(self.name, text, example.label, rule=self.rule)

    def describe(self) -> dict[str, Any]:
        file = self._file
        return {
            "template": self.template,
            "rule": self.rule,
            "truncation": "middle, after reserving the answer",
            "max_new_tokens": self.max_new_tokens,
            "data": HUB_NAME if file is None else {"file": file.name, "sha256": checked(self.name, file, fields_of)},
        }

    def examples(self) -> Iterator[Example]:
        new_tokens = self.max_new_tokens
        # Both published programs fall back to 500 where the answer would take the whole length.
        reserved = new_tokens if new_tokens < self.length else 500
        for index, record in enumerate(read_records(self.name, self.data)):
            prompt = make_prompt(self.name, record, self.template)
            prompt, facts = cut_middle(self.tokens, prompt, self.length - reserved)
            label = record.label
            shown = label if isinstance(label, list) else [label]
            yield Example(
                id=str(index),
                document=prompt.document,
                query=prompt.query,
                references=tuple(str(item) for item in shown),
                max_new_tokens=reserved,
                info={**facts, "record": record.id},
                label=label,
                embedded_query=prompt.embedded,
            )

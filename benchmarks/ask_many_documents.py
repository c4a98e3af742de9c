"""Documents with several questions each, for ``ask_many``: synthetic tasks, and a part of SQuAD."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apb_jax.prompt.ids import Text
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.grading import is_correct
from apb_jax.synthetic.haystack import filler, novel
from apb_jax.synthetic.sample import Line, Role, fill, tokens_of
from apb_jax.synthetic.tasks import TASKS, World
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny.tokenizer import BOS_ID

MERGED = {"multikey": 2, "vt": 1, "update": 2, "relay": 1}
"""Samples of a task that share a document: as many as training had in one, eight questions at most."""


@dataclass(frozen=True)
class Asked:
    """A question and how its answer is judged."""

    task: str
    query: Text
    right: Callable[[str], bool]


@dataclass(frozen=True)
class Paper:
    """A document and what is asked about it."""

    document: Text
    questions: tuple[Asked, ...]


def synthetic(encoder: Encoder, tokens: int, count: int, seed: int, tasks: Sequence[str]) -> list[Paper]:
    """Documents of needles with several keys, chains of variables, updated and relayed numbers, in turn.

    Key words are held out from training. Samples of a task share one text: their sentences keep their order.
    """
    rng = np.random.default_rng([seed, tokens])
    world = World(rng, encoder, vocabulary(held_out=True), (filler(), novel()))
    papers = []
    for task in itertools.islice(itertools.cycle(tasks), count):
        number = MERGED[task]
        samples = [TASKS[task](world, 1024) for _ in range(number)]
        told = [[line for line in sample.document if hidden(line)] for sample in samples]
        turns = rng.permutation(np.repeat(np.arange(number), [len(lines) for lines in told]))
        places = [iter(lines) for lines in told]
        document = fill(rng, encoder, world.hay(), [next(places[turn]) for turn in turns], tokens - 1)
        ids = np.concatenate([[BOS_ID], tokens_of(document, encoder)]).astype(np.int32)
        questions = [
            Asked(task, tokens_of((question.text,), encoder), partial(is_correct, values=question.values))
            for sample in samples
            for question in sample.questions
        ]
        papers.append(Paper(ids, tuple(questions)))
    return papers


def hidden(line: Line) -> bool:
    """Whether a line is the task's own rather than the haystack's."""
    return any(piece.role is not Role.TEXT for piece in line)


def plain(text: str) -> str:
    """SQuAD's normal form: lower case, no articles, no punctuation, single spaces."""
    kept = re.sub(r"[^\w\s]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def holds(text: str, answers: tuple[str, ...]) -> bool:
    """Whether an answer holds one of the accepted ones as whole words."""
    return any(f" {plain(one)} " in f" {plain(text)} " for one in answers)


def squad(path: Path, length_of: Callable[[str], int], tokens: int, questions: int, count: int) -> list[Paper]:
    """Paragraphs of one article each, up to ``tokens``, and answerable questions spread over them."""
    papers = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        kept: list[dict[str, Any]] = []
        seen: set[str] = set()
        length = 0
        for paragraph in article["paragraphs"]:
            if paragraph["context"] in seen:
                continue
            length += length_of(paragraph["context"]) + 1
            if length > tokens:
                break
            seen.add(paragraph["context"])
            kept.append(paragraph)
        asked = [qa for paragraph in kept for qa in paragraph["qas"][:2] if qa["answers"]]
        if len(asked) < questions:
            continue
        spread = [asked[round(i * (len(asked) - 1) / (questions - 1))] for i in range(questions)]
        judged = [
            Asked("squad", f"{qa['question']} Answer in a few words.",
                  partial(holds, answers=tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))))
            for qa in spread
        ]  # fmt: skip
        papers.append(Paper("\n".join(paragraph["context"] for paragraph in kept), tuple(judged)))
        if len(papers) == count:
            break
    return papers

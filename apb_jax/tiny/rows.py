"""Training rows: a sample laid out as tokens, positions and loss weights of one fixed length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import Haystack
from apb_jax.synthetic.sample import Line, Question, Role, Sample, length_of
from apb_jax.synthetic.tasks import TASKS, World
from apb_jax.synthetic.vocabulary import vocabulary
from apb_jax.tiny import QUERY_AT
from apb_jax.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID

MIX = {
    "single": 0.03, "multikey": 0.20, "haystack": 0.20, "passkey": 0.03, "multivalue": 0.11, "multiquery": 0.07,
    "vt": 0.14, "value": 0.02, "relay": 0.04, "update": 0.14, "text": 0.02,
}  # fmt: skip
"""Share of rows per task."""

WEIGHT = {Role.TEXT: 0.3, Role.SECRET: 0.0, Role.ANSWER: 1.0, Role.VALUE: 1.0, Role.REPEAT: 1.0}
DECISIVE_WEIGHT, DECISIVE_TOKENS = 8.0, 2
"""The first two tokens of a value are where the key must have been matched; the rest is copying."""

QUESTION_TEXT_WEIGHT = 0.05
"""The wording of a question is no text to learn from."""


_EOS = np.asarray([EOS_ID], np.int32)


@dataclass(frozen=True)
class Rows:
    """A batch: tokens, positions int32 [rows, length + 1]; weights float32 [rows, length] of tokens[:, 1:]."""

    tokens: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def _question_cost(question: Question, encoder: Encoder) -> int:
    return length_of(question.text, encoder) + length_of(question.answer, encoder) + 1


def spread_positions(rng: np.random.Generator, count: int, limit: int) -> np.ndarray:
    """Increasing int32 positions 0..limit-1 with up to 8 jumps at random places; half of the rows have none."""
    positions = np.arange(count, dtype=np.int32)
    slack = limit - count
    if slack <= 0 or rng.random() < 0.5:
        return positions
    jumps = int(rng.integers(1, 9))
    total = rng.random() * slack
    sizes = (rng.dirichlet(np.ones(jumps)) * total).astype(np.int32)
    for place, size in zip(rng.integers(1, count, jumps), sizes, strict=True):
        positions[place:] += size
    return positions


def lay_out(sample: Sample, encoder: Encoder, *, embed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and their weights: BOS, [first question,] document, then question, answer, EOS in turn."""
    tokens = [np.asarray([BOS_ID], np.int32)]
    heavy: list[tuple[int, int, float]] = []
    n = 1

    def add(line: Line, text_weight: float) -> None:
        nonlocal n
        for piece in line:
            ids = encoder(piece.text)
            tokens.append(ids)
            end = n + len(ids)
            role = piece.role
            if role is Role.TEXT:
                if text_weight != WEIGHT[Role.TEXT]:
                    heavy.append((n, end, text_weight))
            elif role is Role.REPEAT:
                heavy.append((n, n + 1, 0.0))
                heavy.append((n + 1, end, WEIGHT[role]))
            else:
                heavy.append((n, end, WEIGHT[role]))
                if role is Role.VALUE:
                    heavy.append((n, min(end, n + DECISIVE_TOKENS), DECISIVE_WEIGHT))
            n = end

    if embed and sample.questions:
        assert n == QUERY_AT
        add(sample.questions[0].text, 0.0)
        heavy.append((0, n, 0.0))
    for line in sample.document:
        add(line, WEIGHT[Role.TEXT])
    for question in sample.questions:
        add(question.text, QUESTION_TEXT_WEIGHT)
        add(question.answer, 1.0)
        tokens.append(_EOS)
        heavy.append((n, n + 1, 1.0))
        n += 1
    weights = np.full(n, WEIGHT[Role.TEXT], np.float32)
    weights[0] = 0.0
    for begin, end, weight in heavy:
        weights[begin:end] = weight
    return np.concatenate(tokens), weights


def training_sample(world: World, length: int) -> tuple[Sample, bool]:
    """A sample that fits ``length`` tokens with as many of its questions as fit, and whether its first is embedded."""
    rng, encoder = world.rng, world.encoder
    name = str(rng.choice(list(MIX), p=np.asarray(list(MIX.values())) / sum(MIX.values())))
    embed = bool(rng.random() < 0.5)
    most = {256: 2, 1024: 4, 4096: 10, 8192: 16, 16384: 32}.get(length, max(1, length // 512))
    reserve = 130 if length < 512 else 120 + 45 * (most - 1)
    if name == "text":
        reserve = 2
    sample = TASKS[name](world, length - reserve)
    used = 1 + sum(length_of(line, encoder) for line in sample.document)
    kept: list[Question] = []
    for question in sample.questions[:most]:
        cost = _question_cost(question, encoder)
        if not kept and embed:
            cost += length_of(question.text, encoder)
        if used + cost > length:
            break
        kept.append(question)
        used += cost
    return replace(sample, questions=tuple(kept)), embed


def make_rows(world: World, rows: int, length: int, max_positions: int) -> Rows:
    """``rows`` rows of ``length`` predicted tokens each."""
    tokens = np.full((rows, length + 1), PAD_ID, np.int32)
    weights = np.zeros((rows, length + 1), np.float32)
    positions = np.zeros((rows, length + 1), np.int32)
    for r in range(rows):
        sample, embed = training_sample(world, length)
        ids, weight = lay_out(sample, world.encoder, embed=embed)
        n = min(len(ids), length + 1)
        tokens[r, :n], weights[r, :n] = ids[:n], weight[:n]
        positions[r] = spread_positions(world.rng, length + 1, max_positions)
    return Rows(tokens, positions, weights[:, 1:])


def training_world(encoder: Encoder, haystacks: tuple[Haystack, ...], seed: list[int]) -> World:
    """The varied world of training, with the training vocabulary."""
    return World(np.random.default_rng(seed), encoder, vocabulary(held_out=False), haystacks, varied=True)

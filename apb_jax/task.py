"""What a run answers: the user's document and question, a hidden needle, or random ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.options import DEFAULT_SEQ, RunConfig

RANDOM_QUERY_TOKENS = 32
NEW_TOKENS, NEW_TOKENS_ABOUT_TEXT = 32, 512
QUERY_ROOM = 64
"""Tokens kept free for a needle's question."""


@dataclass(frozen=True)
class Task:
    """A prompt, the right answer where it is known, and what the user should know about how it was made."""

    prompt: Prompt
    truth: str | None = None
    notes: tuple[str, ...] = ()


def new_tokens(config: RunConfig, prompt: Prompt | None = None, positions: int = 1 << 31) -> int:
    """Tokens that the answer may have: as asked for, else what is usual and fits behind the prompt."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    usual = NEW_TOKENS if config.document is None else NEW_TOKENS_ABOUT_TEXT
    if prompt is None:
        return usual
    return max(1, min(usual, positions - len(prompt.document) - len(prompt.query)))


def make_task(config: RunConfig, text: str | None, engine: Engine) -> Task:
    """The task of a run; ``text``: that of ``--document``."""
    if text is not None:
        return document_task(config, text, engine)
    model = engine.model
    positions = model.config.max_positions
    seq = config.seq or min(DEFAULT_SEQ, positions)
    if seq > positions:
        raise UserError(
            f"--seq {seq} exceeds the {positions} positions of {model.name}; nearest legal choice: {positions}"
        )
    rng = np.random.default_rng(config.seed)
    if engine.codec is None:
        if config.needle is not None:
            raise UserError(
                f"--needle needs a tokenizer, and model {config.model!r} with --weights {config.weights} has none"
            )
        rows = seq - RANDOM_QUERY_TOKENS - new_tokens(config)
        if rows < 1:
            raise UserError(f"--seq {seq} leaves no room for a document beside {seq - rows} query and answer tokens")
        document, query = (rng.integers(0, model.config.vocab_size, n) for n in (rows, RANDOM_QUERY_TOKENS))
        return Task(engine.prompt(document, query), None, ("no tokenizer: a document of random token ids",))
    from apb_jax.synthetic.needle import needle_prompt

    digits = config.needle or "".join(map(str, rng.integers(0, 10, 10)))
    task = needle_prompt(model.tokenizer, seq - new_tokens(config) - QUERY_ROOM, digits, config.depth, config.seed)
    return Task(engine.prompt(task.document, task.query), task.answer)


def document_task(config: RunConfig, text: str, engine: Engine) -> Task:
    """The user's document; with ``--seq`` its start and end."""
    if engine.codec is None:
        raise UserError(f"--document is text, and model {config.model!r} has no tokenizer; give a folder with one")
    prompt = engine.prompt(text, str(config.query))
    document = prompt.document
    if config.seq is None:
        return Task(prompt)
    room = config.seq - len(prompt.query) - new_tokens(config)
    if room < 1:
        raise UserError(f"--seq {config.seq} leaves no room for a document beside query and answer")
    if len(document) <= room:
        return Task(prompt)
    half = room // 2
    kept = np.concatenate([document[: room - half], document[len(document) - half :]])
    note = f"--seq {config.seq}: kept start and end of {len(document):,} document tokens, {room:,}"
    return Task(replace(prompt, document=kept), None, (note,))

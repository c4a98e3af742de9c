"""Corpora for retaining heads: (prompt, answer) pairs of token ids from text, JSON, JSONL, or a data set of the HF hub.

A record is one of: ``{"conversations": [{"from", "value"}, ...]}`` (ShareGPT) or ``{"messages": [{"role", "content"},
...]}``, of which the first question and the first reply count; a document (``document``, ``context``, ``prompt`` or
``input``) with an answer (``answer``, ``output`` or ``response``) and perhaps a question (``query``, ``question`` or
``instruction``); plain text, or ``{"text"}``, whose last tokens play the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.files import read_text
from apb_jax.json_text import parse_json
from apb_jax.prompt.codec import PromptCodec

DOCUMENT = ("document", "context", "prompt", "input")
QUESTION = ("query", "question", "instruction")
ANSWER = ("answer", "output", "response")
ASKING, REPLYING = ("human", "user"), ("gpt", "assistant")
TEXT_ANSWER_TOKENS = 128
"""Tokens at the end of a piece of plain text that play the answer."""


@dataclass(frozen=True)
class Record:
    """A document, a question or None, and an answer; answer None: plain text."""

    document: str
    question: str | None
    answer: str | None


@dataclass(frozen=True)
class Example:
    """Token ids: the prompt gets labels, the rows of the answer (question included) give them."""

    prompt: np.ndarray
    answer: np.ndarray


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and value and isinstance(value[0], str):
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return None


def parse_record(record: Any, where: str) -> Record:
    """One record; UserError (naming ``where``) if it has none of the known shapes."""
    if isinstance(record, str):
        return Record(record, None, None)
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is a {type(record).__name__}; a record is an object or a string")
    for field, who, what in (("conversations", "from", "value"), ("messages", "role", "content")):
        turns = record.get(field)
        if isinstance(turns, list):
            said = [(t.get(who), t.get(what)) for t in turns if isinstance(t, Mapping)]
            asked = next((text for speaker, text in said if speaker in ASKING), None)
            reply = next((text for speaker, text in said if speaker in REPLYING), None)
            if not (isinstance(asked, str) and asked and isinstance(reply, str) and reply):
                raise UserError(f"{where}: {field} hold no turn of {ASKING[0]} and {REPLYING[0]} with text")
            return Record(asked, None, reply)
    document, answer = _first(record, DOCUMENT), _first(record, ANSWER)
    if document and answer:
        return Record(document, _first(record, QUESTION), answer)
    if isinstance(record.get("text"), str):
        return Record(record["text"], None, None)
    raise UserError(
        f"{where} has the fields {sorted(record)}; needed: conversations, messages, text, or one of "
        f"{'/'.join(DOCUMENT)} with one of {'/'.join(ANSWER)}"
    )


def read_records(path: Path) -> list[Record]:
    """All records of a .jsonl, .json or text file."""
    text = read_text(path, "--data")
    if not text.strip():
        raise UserError(f"{path} is empty")
    try:
        if path.suffix == ".jsonl":
            lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [parse_record(parse_json(line), f"{path} line {i}") for i, line in lines]
        if path.suffix == ".json":
            whole = parse_json(text)
            items = whole if isinstance(whole, list) else [whole]
            return [parse_record(item, f"{path} record {i}") for i, item in enumerate(items)]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not {path.suffix[1:].upper()}: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise UserError(f"{path} nests deeper than a record does") from error
    return [Record(text, None, None)]


def read_data_set(name: str, split: str) -> list[Record]:
    """All records of a data set that ``datasets.load_dataset`` finds (a hub name or a local folder)."""
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot load data set {name!r}, split {split!r}: {str(error).splitlines()[0]}") from error
    return [parse_record(row, f"{name} row {i}") for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Corpus:
    """Records and how they become tokens.

    ``embed_share``: the share of records whose question also stands in front, as in APB's anchor.
    """

    records: tuple[Record, ...]
    codec: PromptCodec
    max_prompt: int
    max_answer: int
    embed_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.records:
            raise UserError("the corpus has no records")
        if not 0.0 <= self.embed_share <= 1.0:
            raise UserError(f"the share of embedded questions is {self.embed_share}; it must lie between 0 and 1")
        if self.max_prompt < 16 or self.max_answer < 1:
            raise UserError(
                f"lengths are at most {self.max_prompt} and {self.max_answer}; a prompt needs 16 tokens, an answer 1"
            )

    def pieces(self) -> list[Record]:
        """Records with plain text cut into pieces of at most ``max_prompt`` tokens (and an answer's worth)."""
        out: list[Record] = []
        for record in self.records:
            if record.answer is not None:
                out.append(record)
                continue
            ids = self.codec.encode(record.document)
            size = self.max_prompt + min(self.max_answer, TEXT_ANSWER_TOKENS)
            for start in range(0, len(ids), size):
                if len(ids) - start > 2 * TEXT_ANSWER_TOKENS or not out:
                    out.append(Record(self.codec.decode(ids[start : start + size].tolist()), None, None))
        return out

    def example(self, record: Record, index: int = 0) -> Example:
        """Tokens of piece number ``index``; what exceeds ``max_prompt`` or ``max_answer`` tokens is cut off."""
        codec = self.codec
        if record.answer is None:
            ids = np.concatenate([codec.opening, codec.encode(record.document)])
            answer_tokens = max(1, min(self.max_answer, TEXT_ANSWER_TOKENS, len(ids) // 2))
            prompt, answer = ids[:-answer_tokens], ids[-answer_tokens:]
        else:
            after = codec.closing
            document, reply = codec.encode(record.document), codec.encode(record.answer)
            if record.question is None:
                prompt = np.concatenate([codec.opening, document])[: self.max_prompt - len(after)]
                prompt, answer = np.concatenate([prompt, after]), reply
            else:
                request = codec.prompt(record.document, record.question)
                # Golden-ratio steps spread the share evenly over the records, the same way in every run.
                embed = (index * 0.6180339887) % 1.0 < self.embed_share
                front = [codec.opening, request.embedded_query] if embed else [codec.opening]
                prompt, answer = np.concatenate([*front, document]), np.concatenate([request.query, reply])
        if len(prompt) == 0 or len(answer) == 0:
            raise UserError(f"a record has {len(prompt)} prompt and {len(answer)} answer tokens; it needs both")
        return Example(prompt[: self.max_prompt].astype(np.int32), answer[: self.max_answer].astype(np.int32))

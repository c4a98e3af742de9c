"""Samples as token ids in one compact file: all that the device needs to know of a benchmark."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("document", "query", "embedded")


@dataclass(frozen=True)
class Sample:
    """One request: ids int32 of its parts, and what the scorer needs.

    ``kind``: ``ruler``, ``needle``, ``text`` (the query holds the tokens to be scored) or ``heads`` (training: document
    and query are a prompt and its answer).
    """

    kind: str
    length: int
    task: str
    id: str
    document: np.ndarray = field(repr=False)
    query: np.ndarray = field(repr=False)
    embedded: np.ndarray = field(repr=False)
    references: tuple[str, ...] = ()
    new_tokens: int = 1
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.task}/{self.id}"


def write_samples(path: Path, samples: Iterable[Sample], facts: dict[str, Any]) -> None:
    """All samples and facts about how they were made, compressed; ids must fit 16 bits."""
    meta, rows = [], []
    for sample in samples:
        parts = [np.asarray(getattr(sample, name)) for name in PARTS]
        if any(len(part) and not 0 <= part.min() <= part.max() < 2**16 for part in parts):
            raise ValueError(f"{sample.key}: ids outside 0..65535")
        rows.extend(part.astype(np.uint16) for part in parts)
        meta.append(
            [sample.kind, sample.length, sample.task, sample.id, sample.references, sample.new_tokens, sample.info]
        )
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate(rows),
        ends=np.cumsum([len(row) for row in rows]),
        meta=np.frombuffer(json.dumps({"facts": facts, "samples": meta}).encode(), np.uint8),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(buffer.getvalue(), preset=6))


def read_samples(path: Path) -> tuple[list[Sample], dict[str, Any]]:
    """(samples in the file's order, facts)."""
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as arrays:
        ids, ends, meta = arrays["ids"].astype(np.int32), arrays["ends"], json.loads(arrays["meta"].tobytes())
    pieces = iter(np.split(ids, ends[:-1]))
    return [_sample(row, pieces) for row in meta["samples"]], meta["facts"]


def _sample(row: list[Any], pieces: Iterator[np.ndarray]) -> Sample:
    kind, length, task, name, references, new_tokens, info = row
    return Sample(
        kind, length, task, name, next(pieces), next(pieces), next(pieces), tuple(references), new_tokens, info
    )

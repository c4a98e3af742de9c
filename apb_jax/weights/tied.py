"""A head that a checkpoint stores although it is tied to the embedding: dropped where equal, refused where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from apb_jax.model.weights import BY_PATH
from apb_jax.weights.mapping import UnexpectedTensor
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry

BLOCK_BYTES = 64 * 2**20
"""Host memory for the rows compared at a time, of each of the two tensors."""


def without_equal_head(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """``entries`` of a tied model without the head they may hold; both are read to compare them.

    Raises:
        UnexpectedTensor: the head differs from the embedding.
    """
    head, embedding = (entries.get(str(BY_PATH[path].hf)) for path in ("head", "embedding"))
    if head is None or embedding is None or embedding.dtype not in DTYPES:
        return dict(entries)
    if head.dtype not in DTYPES or head.shape != embedding.shape or not _equal(head, embedding):
        raise UnexpectedTensor(
            f"tensor {head.name!r} in {head.file} is unexpected: config.json ties the head to the embedding "
            f"(tie_word_embeddings), and the two differ ({head.dtype} {head.shape} and {embedding.dtype} "
            f"{embedding.shape}); if the head is right, write tie_word_embeddings=false, else delete the tensor"
        )
    return {name: entry for name, entry in entries.items() if name != head.name}


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    rows = one.shape[0]
    step = max(1, BLOCK_BYTES * rows // max(one.nbytes, other.nbytes, 1))
    return all(
        np.array_equal(_rows(one, start, min(rows, start + step)), _rows(other, start, min(rows, start + step)))
        for start in range(0, rows, step)
    )


def _rows(entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor in float32, which holds every dtype of weights exactly."""
    row_bytes = entry.nbytes // entry.shape[0]
    part = replace(
        entry,
        shape=(stop - start, *entry.shape[1:]),
        offset=entry.offset + start * row_bytes,
        nbytes=(stop - start) * row_bytes,
    )
    out = np.empty(part.shape, DTYPES[entry.dtype])
    part.read_into(out)
    return out.astype(np.float32)

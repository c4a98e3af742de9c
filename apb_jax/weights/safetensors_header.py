"""Where every tensor lies inside a safetensors file: header only, checked against the size of the file.

The library's own reader maps whole files into memory; the offsets let ``stream.py`` read one tensor at a time instead.
Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The safetensors dtypes that weights come in."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the format


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: its data are ``nbytes`` contiguous row-major bytes from ``offset`` on."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read_into(self, target: np.ndarray) -> None:
        """Fill ``target`` (same shape and dtype, contiguous) from the file."""
        view = target.reshape(-1).view(np.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(memoryview(view)[done:])  # type: ignore[arg-type]
                if not count:
                    raise UserError(
                        f"{self.file} ends inside tensor {self.name!r} (byte {self.offset + done}); it is truncated"
                    )
                done += count


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one safetensors file, in the order of their data; a damaged or truncated file is refused."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise UserError(f"{file} is not a safetensors file (its first 8 bytes give no header length)")
        if 8 + length > size:
            raise UserError(
                f"{file} is truncated: its header alone takes {8 + length} bytes, the file has {size}; "
                "copy or download it again"
            )
        raw = stream.read(length)
    try:
        header = parse_json(raw)
        header.pop("__metadata__", None)
        entries = tuple(sorted((_entry(name, file, 8 + length, field) for name, field in header.items()), key=_offset))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file: its header does not parse ({error})") from error
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            raise UserError(
                f"{file}: tensor {entry.name!r} starts at byte {entry.offset}, expected {end}; damaged header"
            )
        end += entry.nbytes
    if end > size:
        raise UserError(
            f"{file} is truncated: its header promises {end} bytes, the file has {size}; copy or download it again"
        )
    if end < size:
        raise UserError(f"{file} has {size - end} bytes after its last tensor; it is damaged or not finished")
    return entries


def _offset(entry: TensorEntry) -> int:
    return entry.offset


def _entry(name: str, file: Path, base: int, field: dict) -> TensorEntry:
    shape, (start, end) = tuple(field["shape"]), field["data_offsets"]
    dtype = DTYPES.get(field["dtype"])
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} and dtype {field['dtype']} has {end - start} bytes")
    return TensorEntry(name, file, field["dtype"], shape, base + start, end - start)

"""What a GGUF file says before its data: settings and where every tensor lies, every length held against the file's.

The ``gguf`` package's own reader takes seconds for a vocabulary and trusts the counts it reads; this one does neither.
Format (little-endian): "GGUF", version, number of tensors, number of settings, the settings, the table of tensors, the
data. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.install import install_hint

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""Codes of the numbers among the settings, as numpy spells them."""
STRING, ARRAY = 8, 9
LEAST_SETTING, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that the shortest setting and the shortest row of the table take."""
MAX_DIMENSIONS = 4
ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as it lies in the file: ``nbytes`` of ``kind`` from ``offset`` on; ``shape`` row-major, as in HF."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Settings by key (numbers, strings, lists) and tensors by name."""

    file: Path
    settings: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that calls itself GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return path.suffix.lower() == SUFFIX or stream.read(len(MAGIC)) == MAGIC


def gguf_package() -> Any:
    """The ``gguf`` package, which knows every quantisation."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files need the gguf package: {install_hint('gguf')}") from error
    return gguf


def read_gguf_header(file: Path) -> GGUFHeader:
    """Settings and table of tensors; the last file read is remembered while it does not change.

    Raises:
        UserError: no GGUF file, another byte order or version, a count or length beyond the file, an unknown kind.
    """
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(file: Path, size: int, _changed: int) -> GGUFHeader:
    with file.open("rb") as stream:
        if (magic := stream.read(len(MAGIC))) != MAGIC:
            raise UserError(f"{file} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(file, data, size).header()


class _Parser:
    """Walks through the header; nothing is taken before the file is known to hold it."""

    def __init__(self, file: Path, data: mmap.mmap, size: int) -> None:
        self.file, self.data, self.size = file, data, size
        self.at = len(MAGIC)

    def header(self) -> GGUFHeader:
        version = self.number("<I", "the version")
        if not version & 0xFFFF:
            raise UserError(f"{self.file} is big-endian (version {version:#010x}); only little-endian files are read")
        if version not in VERSIONS:
            raise UserError(
                f"{self.file} is of GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read"
            )
        tensors = self.count(LEAST_TENSOR, "tensors")
        settings = self.named(self.count(LEAST_SETTING, "settings"), "settings", self.setting)
        rows = self.named(tensors, "the table of tensors", self.tensor)
        return GGUFHeader(self.file, settings, self.placed(rows, settings))

    def fail(self, reason: str) -> UserError:
        return UserError(f"{self.file} is damaged or truncated: {reason} (byte {self.at} of {self.size})")

    def number(self, code: str, what: str) -> int:
        width = struct.calcsize(code)
        if self.at + width > self.size:
            raise self.fail(f"it ends inside {what}")
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += width
        return int(value)

    def count(self, least: int, what: str) -> int:
        """A number of things that take at least ``least`` bytes each."""
        value = self.number("<Q", f"the number of {what}")
        if value * least > self.size - self.at:
            raise self.fail(f"it promises {value} {what}, more than the rest of the file can hold")
        return value

    def text(self, what: str) -> str:
        length = self.count(1, f"bytes of {what}")
        raw = self.data[self.at : self.at + length]
        try:
            value = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 ({raw[:20]!r})") from error
        self.at += length
        return value

    def named(self, count: int, what: str, read: Callable[[str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(f"a name in {what}")
            if name in found:
                raise self.fail(f"{name!r} is twice in {what}")
            found[name] = read(name)
        return found

    def setting(self, key: str) -> Any:
        return self.value(self.number("<I", f"the type of {key}"), key)

    def value(self, code: int, key: str) -> Any:
        if code in SCALARS:
            return self.array(code, 1, key)[0]
        if code == STRING:
            return self.text(key)
        if code != ARRAY:
            raise self.fail(f"{key} is of type {code}, which GGUF does not have")
        inner = self.number("<I", f"the type of {key}")
        if inner == STRING:
            return [self.text(key) for _ in range(self.count(8, f"values of {key}"))]
        if inner not in SCALARS:
            raise self.fail(f"{key} is a list of type {inner}; lists of numbers and of strings are read")
        return self.array(inner, self.count(np.dtype(SCALARS[inner]).itemsize, f"values of {key}"), key)

    def array(self, code: int, count: int, key: str) -> list[Any]:
        dtype = np.dtype(SCALARS[code]).newbyteorder("<")
        if self.at + count * dtype.itemsize > self.size:
            raise self.fail(f"it ends inside {key}")
        values: list[Any] = np.frombuffer(self.data[self.at : self.at + count * dtype.itemsize], dtype).tolist()
        self.at += count * dtype.itemsize
        return values

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape, code of the kind, offset in the data)."""
        what = f"the row of tensor {name!r}"
        dimensions = self.number("<I", what)
        if dimensions > MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions; GGUF has at most {MAX_DIMENSIONS}")
        shape = tuple(self.number("<Q", what) for _ in range(dimensions))
        return shape[::-1], self.number("<I", what), self.number("<Q", what)

    def placed(
        self, rows: dict[str, tuple[tuple[int, ...], int, int]], settings: dict[str, Any]
    ) -> dict[str, GGUFTensor]:
        alignment = settings.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}; it must be a power of two")
        start = -(-self.at // alignment) * alignment
        return {name: self.place(name, *row, start) for name, row in rows.items()}

    def place(self, name: str, shape: tuple[int, ...], code: int, offset: int, start: int) -> GGUFTensor:
        gguf = gguf_package()
        try:
            kind = gguf.GGMLQuantizationType(code)
            block, width = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self.file}: tensor {name!r} is of quantisation {code}, which this gguf package does not know; "
                "a newer one may (pip install -U gguf)"
            ) from error
        elements = math.prod(shape)
        if elements % block or (shape and shape[-1] % block):
            raise UserError(
                f"{self.file}: rows of tensor {name!r} {shape} are no multiple of the {block} elements that one "
                f"block of {kind.name} holds; the file is damaged"
            )
        tensor = GGUFTensor(name, kind, shape, start + offset, elements // block * width)
        if tensor.offset + tensor.nbytes > self.size:
            raise UserError(
                f"{self.file} is truncated: tensor {name!r} ends at byte {tensor.offset + tensor.nbytes}, the file has "
                f"{self.size}; copy or download it again"
            )
        return tensor

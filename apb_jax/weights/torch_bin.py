"""Where every tensor lies inside a torch ``.bin``/``.pt`` file, found without running anything the file says.

Such a file is a zip: a pickle that names tensors, and one uncompressed member per storage. The unpickler below knows
the globals that a state dict of plain tensors needs and refuses every other, so nothing foreign is imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry

STORAGES = {"BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32"}


@dataclass(frozen=True)
class _Storage:
    dtype: str
    member: str
    elements: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    """Stands in for torch's rebuild function: keeps the description, builds nothing."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor with an ill-formed description")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Reader(pickle.Unpickler):
    """Describes tensors; any global that plain tensors do not need is refused by name."""

    ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012 - never changed
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no plain tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, member, _, elements = pid
        if kind != "storage" or dtype not in DTYPES or not isinstance(member, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r} of {dtype!r}, not to a storage of floats")
        return _Storage(dtype, member, int(elements))


_DAMAGE = (
    pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, AttributeError, KeyError, RecursionError,
    MemoryError, OverflowError,
)  # fmt: skip
"""What a pickle that torch did not write may raise."""


def read_torch_bin(file: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a torch state dict by name, headers only.

    Raises:
        UserError: not torch's zip format, truncated, anything but a dict of plain tensors, or tensors that are views.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in members:
                raise UserError(f"{file} is a zip but not torch's format (no data.pkl)")
            order = _read(archive, members["byteorder"]).strip() if "byteorder" in members else b"little"
            content = _unpickled(_read(archive, members["data.pkl"]))
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{file} is not a torch file in zip format, or it is truncated ({error}); files written before torch 1.6 "
            "are refused: save it again with a newer torch, or as safetensors"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is refused: it must hold a dict of plain tensors and nothing else ({error})"
        ) from error
    if order != b"little":
        raise UserError(f"{file} is big-endian; only little-endian files are read")
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in content.items()
    ):
        raise UserError(f"{file} is refused: it must hold a dict from names to plain tensors and nothing else")
    return tuple(_entry(file, name, tensor, members) for name, tensor in content.items())


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member as it lies in the file: torch compresses none, so what is read is never larger than the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"its member {info.filename!r} is compressed")
    return archive.read(info)


def _unpickled(content: bytes) -> Any:
    """The description in a pickle; numbers of its memo that no pickle of this length needs are refused.

    The unpickler holds a table as long as the largest such number, which a few bytes could make gigabytes.
    """
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(number or 0) <= len(content):
            raise pickle.UnpicklingError(f"it numbers {number} objects in {len(content)} bytes")
    return _Reader(io.BytesIO(content)).load()


def _entry(file: Path, name: str, tensor: _Tensor, members: dict[str, zipfile.ZipInfo]) -> TensorEntry:
    info = members.get(f"data/{tensor.storage.member}")
    itemsize = DTYPES[tensor.storage.dtype].itemsize
    nbytes = math.prod(tensor.shape) * itemsize
    contiguous = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    if tensor.stride != contiguous:
        raise UserError(f"{file}: tensor {name!r} is a view with strides {tensor.stride}; save it contiguous")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{file}: the data of tensor {name!r} are missing or compressed; save the file again")
    start = tensor.offset * itemsize
    if start + nbytes > info.file_size:
        raise UserError(f"{file}: tensor {name!r} reaches beyond its storage; the file is damaged")
    return TensorEntry(name, file, tensor.storage.dtype, tensor.shape, _data_offset(file, info) + start, nbytes)


def _data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose name and padding have their own lengths."""
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length

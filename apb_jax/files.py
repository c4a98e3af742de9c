"""Files in and out: checked before the work begins, read with limits, and written whole or not at all."""

from __future__ import annotations

import difflib
import json
import math
import os
import select
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError

TEXT_BYTES = 64 * 2**20
"""Most bytes of a text: about 16M tokens, beyond the positions of every model."""
MOST_NUL = 0.01
"""The share of zero bytes beyond which a file that happens to be UTF-8 is taken for binary."""
SILENCE_S = 60.0
"""Standard input that sends nothing for so long is given up."""
MARK = "apb_jax-writing"
"""Part of the name of a file that is not whole yet."""


def near_file(path: Path) -> str:
    """ "; did you mean ...?" where the folder holds a file of a similar name."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.name != path.name]
    except OSError:  # no such folder, or not ours to look into: then there is nothing to propose
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def what_is(path: Path) -> str | None:
    """ "file", "folder", another kind in words, or None: nothing there. UserError where the system does not say."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: {reason(error)}") from error
    kinds = (
        (stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    )  # fmt: skip
    return next((name for test, name in kinds if test(mode)), "a device")


def shown(path: object, most: int = 120) -> str:
    """A path or value for one line: shortened in the middle."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 3 :]} ({len(text)} characters)"


def reason(error: BaseException) -> str:
    """What the operating system says, without the number."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:160] or type(error).__name__


# -- reading ----------------------------------------------------------------------------------------------------------


def check_input(path: str | Path, name: str) -> Path:
    """The path of an ordinary file that can be read; UserError for what is absent, a folder, a pipe or a device."""
    path = Path(path)
    kind = what_is(path)
    if kind is None:
        raise UserError(f"{name} {shown(path)}: no such file{near_file(path)}")
    if kind == "folder":
        raise UserError(f"{name} {shown(path)} is a folder; give one text file")
    if kind != "file":
        raise UserError(f"{name} {shown(path)} is {kind}; give a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} {shown(path)} cannot be read: Permission denied")
    return path


def read_text(path: str | Path, name: str) -> str:
    """A UTF-8 text of at most TEXT_BYTES; UserError that names ``name`` (an option) for everything else."""
    path = check_input(path, name)
    try:
        with path.open("rb") as file:
            raw = file.read(TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name} {shown(path)} cannot be read: {reason(error)}") from error
    return decode_text(raw, f"{name} {shown(path)}")


def read_stdin(name: str) -> str:
    """Standard input as text; UserError where there is none, or where it stays silent for SILENCE_S."""
    if sys.stdin is None:
        raise UserError(f"{name}: there is no standard input; give a file")
    stream: Any = sys.stdin.buffer
    try:
        handle = stream.fileno()
    except (OSError, ValueError):
        handle = None  # not a file of the operating system (a test, a notebook): it cannot be waited for
    raw = b""
    try:
        while len(raw) <= TEXT_BYTES:
            if handle is not None and not select.select([handle], [], [], SILENCE_S)[0]:
                raise UserError(f"{name}: standard input sent nothing for {SILENCE_S:.0f} s; give a file")
            part = stream.read1(2**20)
            if not part:
                break
            raw += part
    except OSError as error:
        raise UserError(f"{name}: standard input cannot be read: {reason(error)}") from error
    return decode_text(raw, f"{name}: standard input")


def decode_text(raw: bytes, what: str) -> str:
    """UTF-8 bytes (a byte order mark is dropped) as text; refuses what is too long, not UTF-8, or binary."""
    if len(raw) > TEXT_BYTES:
        raise UserError(f"{what} is longer than {TEXT_BYTES // 2**20} MiB; cut it into parts")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start}); "
            "convert it, for example with iconv -t utf-8"
        ) from error
    if raw.count(0) > len(raw) * MOST_NUL:  # a stray one is a character like any other
        raise UserError(f"{what} is binary, not text (byte 0x00 at offset {raw.index(0)})")
    return text


def read_json(path: str | Path, name: str) -> Any:
    """A JSON file; UserError for damaged ones, also for numbers that JSON does not know (NaN) and endless nesting."""
    text = read_text(path, name)
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} {shown(path)} is not JSON: {reason(error)}") from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


# -- writing ----------------------------------------------------------------------------------------------------------


def check_output_file(path: str | Path, name: str) -> Path:
    """The path of a file that can be written: new, or an ordinary file to replace. Leaves nothing behind."""
    path = Path(path)
    kind = what_is(path)
    if kind == "folder":
        raise UserError(f"{name} {shown(path)} is a folder; give the name of a file")
    if kind not in (None, "file"):
        raise UserError(f"{name} {shown(path)} is {kind}; give the name of a file")
    if kind is None and str(path).endswith(("/", "/.", "/..")):
        raise UserError(f"{name} {shown(path)} names no file")
    _probe(path.absolute().parent, f"{name} {shown(path)}")
    return path


def check_output_folder(path: str | Path, name: str) -> Path:
    """The path of a folder that exists or can be made, and can be written into. Leaves nothing behind."""
    path = Path(path)
    kind = what_is(path)
    if kind not in (None, "folder"):
        raise UserError(f"{name} {shown(path)} is {'a file' if kind == 'file' else kind}; give a folder")
    _probe(path.absolute(), f"{name} {shown(path)}")
    return path


def _probe(folder: Path, what: str) -> None:
    """Write an unnamed file into the nearest folder that exists."""
    place = next((p for p in (folder, *folder.parents) if what_is(p) is not None), Path("/"))
    if not place.is_dir():
        raise UserError(f"{what} cannot be written: {shown(place)} is no folder")
    try:
        if place != folder:  # what is to be made: its name must be one that the file system takes
            os.rmdir(tempfile.mkdtemp(dir=place))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{what} cannot be written: {reason(error)} ({shown(place)})") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: it becomes ``path`` when the block ends well, synced, and is gone otherwise.

    The mode is that of any new file (0666 less the umask), whatever wrote it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name[:200]}.{os.getpid()}.{MARK}{path.suffix}")
        try:
            yield part
            umask = os.umask(0)
            os.umask(umask)
            with part.open("rb+") as file:
                os.fchmod(file.fileno(), 0o666 & ~umask)
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {reason(error)}; nothing was kept of it") from error


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file in one step."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Replace a JSON file in one step; UserError where a number is not finite, which JSON cannot hold."""
    write_text(path, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON without NaN and infinity: UserError names the first place that holds one."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{_not_finite(value) or 'a number'} is not finite; JSON cannot hold it") from error


def _not_finite(value: Any, place: str = "") -> str | None:
    """The place of the first number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'the number'} ({value})"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for k, v in items if (found := _not_finite(v, f"{place}.{k}" if place else str(k)))), None)

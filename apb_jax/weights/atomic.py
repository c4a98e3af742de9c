"""Output that is either whole or absent: written beside its target, moved there in one step."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apb_jax.errors import UserError

PARTIAL = ".partial"
"""Suffix of unfinished output; folders and files of this name are never loaded."""


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """An empty folder ``<target>.partial`` that becomes ``target`` when the block ends well.

    A killed run leaves only the ``.partial`` folder, which the next run empties. An error removes it at once.
    """
    with _workplace(target) as partial:
        yield partial
        make_durable(partial)
        partial.rename(target)
        sync(target.absolute().parent)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path inside a folder ``<target>.partial`` whose file replaces nothing and becomes ``target`` in the end."""
    with _workplace(target) as folder:
        partial = folder / target.name
        yield partial
        make_durable(folder)
        partial.rename(target)
        sync(target.absolute().parent)
        _remove(folder)


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """An empty folder ``<target>.partial``, locked while the block runs and removed where it ends in an error."""
    if target.exists():
        raise UserError(f"{target} exists; choose another --out or remove it first")
    partial = target.with_name(target.name + PARTIAL)
    with disk_errors(target):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(partial, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError) as error:  # its owner finished while we looked
            if partial.exists():
                raise
            raise UserError(f"another conversion into {target} has just finished") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another conversion into {target} is running") from error
        if not _is_open(partial, handle):  # its owner finished between our opening and our locking it
            raise UserError(f"another conversion into {target} has just finished")
        _empty(partial)
        try:
            with disk_errors(target):
                yield partial
        except BaseException:
            _remove(partial)
            raise
    finally:
        os.close(handle)


def _is_open(path: Path, handle: int) -> bool:
    """Whether the path still names what the handle was opened on."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns a full disk, a file-size limit or missing rights into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"cannot write {target}: {os.strerror(error.errno)}; nothing was kept") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"cannot write {target}: {os.strerror(error.errno)}") from error
        raise
    except ValueError as error:  # TensorStore reports the operating system's errors as text
        if isinstance(error, UserError):
            raise
        for reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG), os.strerror(errno.EDQUOT)):
            if reason in str(error):
                raise UserError(f"cannot write {target}: {reason}; nothing was kept") from error
        raise


def require_space(target: Path, needed: int) -> None:
    """Refuse before any work if the disk of ``target`` has fewer than ``needed`` bytes free."""
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of {target} has {free / 1e9:.2f} GB free; the output takes {needed / 1e9:.2f} GB: "
            "choose another --out"
        )


def make_durable(folder: Path) -> None:
    """Give every file the mode that the folder was made with, and bring all to the disk, lists of files included.

    Some libraries write through temporary files, which nobody but their owner may read. After a power cut a rename may
    be there and what it renamed not, unless that was brought to the disk before.
    """
    mode = folder.stat().st_mode & 0o666  # as the umask left it
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished(folder: Path) -> bool:
    """Whether a ``.partial`` folder was left behind: no process is writing it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _remove(folder: Path) -> None:
    """Remove a folder into which TensorStore's threads may still write, making it anew: until it stays away a second.

    Gives up after ten seconds; what stays never loads, and the next run empties it.
    """
    away = 0
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        away = 0 if folder.exists() else away + 1
        if away == 10:
            return
        time.sleep(0.1)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""The one entry of all commands: what can be foreseen ends in one line on standard error and status 2.

    @command("python -m apb_jax.calibrate")
    def main(argv: list[str]) -> int: ...

Real faults of the program keep their traceback. ``APB_JAX_TRACEBACK=1`` shows it for foreseen ones too.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from apb_jax.errors import UserError
from apb_jax.files import reason, shown

FAILED = 2
LONGEST_LINE = 1000
"""Characters of an error that are shown: a value that it repeats may be of any length."""
GRACE_S = 5.0
"""After Ctrl-C the command has so long to clean up; an exception raised inside a callback of XLA would be lost."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out[ _]of[ _]memory|bad_alloc|failed to allocate|could not allocate|cannot allocate memory"
    r"|unable to allocate|ALLOC_FAILED|cudaErrorMemoryAllocation|\bOOM\b",
    re.IGNORECASE,
)
NO_BACKEND = re.compile(
    r"nable to initialize backend|nknown backend|not in the list of known backends|No visible .*device"
)
Main = Callable[[list[str]], int | None]


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, no usage dump; ``--help`` shows every default."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        name = "/".join(action.option_strings[:1]) or str(action.metavar or action.dest)
        if "\0" in arg_string:
            raise UserError(f"{name} {shown(arg_string, 60)!r} holds a NUL character")
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, UserError):  # our own words, not "invalid parse value"
                raise error.__context__ from None
            if isinstance(error.__context__, argparse.ArgumentTypeError):
                raise UserError(f"{name} {error.__context__}") from None
            raise

    def _get_formatter(self) -> argparse.HelpFormatter:
        for action in self._actions:
            told = action.help is None or "default" in action.help or action.help == argparse.SUPPRESS
            shows = (
                action.option_strings and action.nargs != 0 and action.default not in (None, [], (), argparse.SUPPRESS)
            )
            if shows and not told:
                action.help = f"{action.help} (default: %(default)s)"
            elif shows and action.help is None:
                action.help = "default: %(default)s"
        return super()._get_formatter()

    def _options(self, chosen: argparse.Namespace) -> set[str]:
        """The options of this parser and of the command that was given."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                own = action.choices.get(str(getattr(chosen, action.dest, "")))
                found |= own._options(chosen) if own else set()
        return found

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What was given; an unknown option is told with the nearest one of the same command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            if (name := unknown[0].partition("=")[0]).startswith("-"):
                near = difflib.get_close_matches(name, self._options(found) - {name}, n=1)
                message += f"; did you mean {near[0]}?" if near else "; see --help"
            raise UserError(message)
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def command(prog: str, *, at_once: bool = False, resumes: str = "") -> Callable[[Main], Callable[..., int]]:
    """A command from its body ``main(argv) -> status or None``; the body raises for everything that is wrong.

    Args:
        prog: what people type, for the help.
        at_once: Ctrl-C ends the process without cleaning up: for work inside XLA with nothing to clean up.
        resumes: added to the line about an interruption: how to go on.
    """

    def wrap(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            arguments = list(sys.argv[1:] if argv is None else argv)
            try:
                with _signals(at_once, resumes):
                    _check_streams()
                    _check_arguments(arguments)
                    status = main(arguments)
                    sys.stdout.flush()
                return status or 0
            except SystemExit as error:  # argparse's --help
                return _status(error)
            except KeyboardInterrupt:
                return fail(f"interrupted{resumes}")
            except Exception as error:
                line = words(error)
                if line is None or os.environ.get("APB_JAX_TRACEBACK") == "1":
                    raise
                return fail(line)

        run.prog = prog  # type: ignore[attr-defined]
        return run

    return wrap


def words(error: BaseException) -> str | None:
    """The line for a foreseeable fault; None: a fault of the program, which deserves its traceback."""
    from pallas_kernels.errors import KernelInputError, Unsupported

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, KernelInputError | Unsupported):
        return f"--kernels: {text}; nearest legal choice: --kernels auto"
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return "standard output was closed before everything was written"
    full = next((word for word in map(os.strerror, DISK_FULL) if word in text), os.strerror(errno.ENOSPC))
    if getattr(error, "errno", None) in DISK_FULL or full in text:
        place = getattr(error, "filename", None)
        if place is None:
            _drop_stdout()
        return f"{full}: {shown(place) if place else 'standard output or a file could not be written'}"
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return (
            "out of memory; use more devices (--sp, --tp), a shorter --seq, or --dtype bf16: "
            + (text or type(error).__name__)[:160]
        )
    if isinstance(error, OSError):
        place = f"{shown(error.filename)}: " if error.filename else ""
        return f"{place}{reason(error)}"
    if isinstance(error, RuntimeError) and NO_BACKEND.search(text):
        return f"JAX found no device (JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}): {text[:160]}"
    if isinstance(error, RuntimeError) and "home directory" in text:
        return "this user has no home directory; set HOME to a folder that can be written"
    if isinstance(error, UnicodeEncodeError):
        return f"standard output takes {error.encoding} only; set PYTHONIOENCODING=utf-8"
    return None


def fail(message: str) -> int:
    """One line, status 2."""
    if sys.stderr is not None:
        line = f"error: {shown(' '.join(message.split()), LONGEST_LINE)}\n"
        sys.stderr.write(line.encode("utf-8", "backslashreplace").decode("utf-8"))
        sys.stderr.flush()
    return FAILED


def _status(error: SystemExit) -> int:
    if isinstance(error.code, str):
        return fail(error.code.removeprefix("error: "))
    return error.code or 0


def _check_streams() -> None:
    """There must be a place for the result; a terminal that is not UTF-8 gets escapes instead of a crash."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- as long as the process
    if sys.stdout is None:
        raise UserError("standard output is closed; there is no place for the result")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")


def _check_arguments(arguments: list[str]) -> None:
    for text in arguments:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the argument {shown(text, 60)!a} is not UTF-8 text") from None


def _drop_stdout() -> None:
    """What is still buffered cannot be written; without this Python complains once more when it ends."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- as long as the process


@contextmanager
def _signals(at_once: bool, resumes: str) -> Iterator[None]:
    """Ctrl-C and a termination end the command in one line and status 2, whatever it is doing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end() -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # rich hides the cursor while a bar moves
        os._exit(fail(f"interrupted{resumes}"))

    def stop(signum: int, frame: object) -> None:
        if at_once or pending:
            end()
        timer = threading.Timer(GRACE_S, end)
        timer.daemon = True
        pending.append(timer)
        timer.start()
        raise KeyboardInterrupt

    pending: list[threading.Timer] = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for timer in pending:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)

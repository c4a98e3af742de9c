"""Choosing an implementation: by name, without fallback, or the first of an ordered list that accepts."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels import device
from pallas_kernels.errors import KernelInputError, Unsupported


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``refuse(call, device)`` returns the reason why it cannot serve the call there, or None;
    ``run(call)`` computes it. ``automatic`` says whether the automatic choice may take it.
    """

    name: str
    run: Callable[[Any], Any]
    refuse: Callable[[Any, device.Device], str | None]
    automatic: bool = True


_recorders: contextvars.ContextVar[tuple[dict[str, set[str]], ...]] = contextvars.ContextVar("recorders", default=())


@contextlib.contextmanager
def record_choices() -> Iterator[dict[str, set[str]]]:
    """Inside, every choice is noted: ``{op: {names of implementations}}``, filled while programs are traced.

    A program that JAX has already traced chooses nothing again, so record where it is traced first.
    """
    seen: dict[str, set[str]] = {}
    token = _recorders.set((*_recorders.get(), seen))
    try:
        yield seen
    finally:
        _recorders.reset(token)


def choose(op: str, implementations: Sequence[Implementation], name: str | None, call: Any) -> Implementation:
    """The implementation called ``name``, or with None the first automatic one that accepts ``call``; recorded.

    Raises:
      KernelInputError: no implementation has that name.
      Unsupported: the named implementation refuses; another is never tried.
      ExceptionGroup: no automatic implementation accepts; it holds one Unsupported for each.
    """
    chosen = _choose(op, implementations, name, call)
    for seen in _recorders.get():
        seen.setdefault(op, set()).add(chosen.name)
    return chosen


def _choose(op: str, implementations: Sequence[Implementation], name: str | None, call: Any) -> Implementation:
    here = device.current()
    if name is not None:
        for implementation in implementations:
            if implementation.name == name:
                if reason := implementation.refuse(call, here):
                    raise Unsupported(f"{op}: {name} {reason}")
                return implementation
        names = ", ".join(implementation.name for implementation in implementations)
        raise KernelInputError(f"{op} has no implementation {name!r}; it has {names}")
    refusals = []
    for implementation in implementations:
        if not implementation.automatic:
            continue
        reason = implementation.refuse(call, here)
        if reason is None:
            return implementation
        refusals.append(Unsupported(f"{op}: {implementation.name} {reason}"))
    raise ExceptionGroup(f"no implementation of {op} accepts this call", refusals)


def accepts_all(call: Any, device: device.Device) -> None:
    """The ``refuse`` of an implementation that serves every valid call on every device."""
    del call, device

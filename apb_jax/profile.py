"""A profiler's trace of a run, written when the run has ended: what goes wrong then must not cost the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def profiled(folder: str | None) -> Iterator[list[str]]:
    """Trace what runs inside into ``folder`` (None: nothing); the list holds afterwards why it could not be written."""
    failed: list[str] = []
    if folder is None:
        yield failed
        return
    jax.profiler.start_trace(folder)
    try:
        yield failed
    finally:
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            failed.append(" ".join(str(error).split()) or type(error).__name__)

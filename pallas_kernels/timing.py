"""Device time of a jitted function, as the profiler reports it (CUPTI: kernels only, no launch gaps)."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
from jax.experimental.mosaic.gpu import profiler


def device_ms(run: Callable, sets: Sequence[tuple], repeats: int = 24) -> float:
    """Median device time in ms of one call of ``run`` over at least ``repeats`` calls after a warm-up.

    ``sets``: one or more tuples of arguments. With several, one program calls ``run`` on each in turn, so that
    no call finds its inputs in the L2 cache; give as many as together exceed it.
    """
    size = len(sets[0])

    @jax.jit
    def rotate(*flat):
        outs = []
        for i in range(len(sets)):
            arguments = jax.lax.optimization_barrier(flat[i * size : (i + 1) * size])
            outs.append(run(*arguments))
        return outs

    rounds = -(-repeats // len(sets))
    flat = [array for arrays in sets for array in arrays]
    try:
        measured = profiler.measure(rotate, iterations=rounds)(*flat)[1]
    except RuntimeError:  # kernels on several streams end in another order each time: one call at a time, then
        measured = [_one_call_ms(rotate, flat) for _ in range(rounds)]
    times = [ms for ms in (measured if isinstance(measured, list) else [measured]) if ms is not None]
    if not times:
        raise RuntimeError("the profiler saw no kernel; is the default device a GPU?")
    return statistics.median(times) / len(sets)


def _one_call_ms(call: Callable, arrays: Sequence) -> float:
    """Device time in ms of all kernels of one call."""
    kernels = profiler.measure(call, aggregate=False)(*arrays)[1] or []
    return float(sum(ms for _, ms in kernels))


def rested_ms(run: Callable, arrays: tuple, repeats: int = 8, pause_s: float = 0.15) -> float:
    """Median device time in ms of one call after ``pause_s`` of rest: without the power limit of sustained load."""
    call = jax.jit(run)
    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(repeats):
        time.sleep(pause_s)
        times.append(_one_call_ms(call, arrays))
    return statistics.median(times)

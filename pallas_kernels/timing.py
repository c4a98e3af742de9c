"""Device time of a jitted function, as the profiler reports it (CUPTI: kernels only, no launch gaps)."""

import statistics
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
    measured = profiler.measure(rotate, iterations=rounds)(*[array for arrays in sets for array in arrays])[1]
    times = [ms for ms in (measured if isinstance(measured, list) else [measured]) if ms is not None]
    if not times:
        raise RuntimeError("the profiler saw no kernel; is the default device a GPU?")
    return statistics.median(times) / len(sets)

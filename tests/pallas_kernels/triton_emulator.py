"""Runs a Pallas Triton kernel body eagerly on numpy arrays, and fails where an unmasked access leaves an array.

Pallas' interpret mode lacks masked loads through index vectors, which these kernels need.
"""

import contextlib
from dataclasses import dataclass
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Window:
    array: np.ndarray
    index: tuple


class Ref:
    """A kernel argument: knows ``at``, ``shape`` and ``dtype``."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return Window(self.array, index if isinstance(index, tuple) else (index,))


def _places(window, mask):
    """Index arrays of every element of the window, clipped, once it is sure that the mask hides the outside."""
    vectors = [
        np.arange(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice) else np.asarray(i)
        for i in window.index
    ]
    shape = tuple(v.size for v in vectors if v.ndim)
    places, axis = [], 0
    for vector, size in zip(vectors, window.array.shape, strict=True):
        if vector.ndim:
            vector = vector.reshape([-1 if n == axis else 1 for n in range(len(shape))])
            axis += 1
        inside = np.broadcast_to((vector >= 0) & (vector < size), shape)
        wanted = np.broadcast_to(True if mask is None else np.asarray(mask), shape)
        assert (inside | ~wanted).all(), f"an unmasked access leaves an axis of size {size}"
        places.append(np.clip(vector, 0, size - 1))
    return tuple(places), shape


def load(window, mask=None, other=None):
    places, shape = _places(window, mask)
    values = jnp.asarray(np.broadcast_to(window.array[places], shape))
    return values if mask is None else jnp.where(mask, values, jnp.asarray(other, values.dtype))


def store(window, value, mask=None):
    places, shape = _places(window, mask)
    wanted = np.broadcast_to(True if mask is None else np.asarray(mask), shape)
    places = tuple(np.broadcast_to(place, shape)[wanted] for place in places)
    window.array[places] = np.broadcast_to(np.asarray(value), shape)[wanted]


def pallas_call(kernel, out_shape, grid, **_):
    """Every program of the grid, one after another; outputs start as NaN or an impossible number."""
    single = not isinstance(out_shape, tuple)

    def run(*inputs):
        outs = [
            np.full(s.shape, np.nan if jnp.issubdtype(s.dtype, jnp.floating) else -(10**6), s.dtype)
            for s in ((out_shape,) if single else out_shape)
        ]
        refs = [Ref(np.asarray(a)) for a in inputs] + [Ref(out) for out in outs]
        for place in np.ndindex(*grid):
            with mock.patch.object(pl, "program_id", lambda axis, place=place: jnp.int32(place[axis])):
                kernel(*refs)
        results = tuple(map(jnp.asarray, outs))
        return results[0] if single else results

    return run


@contextlib.contextmanager
def emulated():
    """Inside, Pallas Triton calls run here."""
    with (
        mock.patch.object(pl, "pallas_call", pallas_call),
        mock.patch.object(plt, "load", load),
        mock.patch.object(plt, "store", store),
        jax.disable_jit(),
    ):
        yield

"""Weights from files straight to their place on the mesh, a few layers at a time: never a second copy on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from apb_jax.model.weights import BY_PATH, QUANTISED
from apb_jax.weights.mapping import Rule
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry
from apb_jax.weights.spread import spread
from pallas_kernels.float8 import FP8, quantise

STAGING_BYTES = 512 * 2**20
"""Host memory for the layers on their way; two such blocks exist at a time (one being read, one being copied)."""
READERS = 4
HOST_TRANSPOSES = frozenset({"cpu"})
"""Platforms whose host-to-device copy transposes fast, while their compiled transposes are slow. GPUs: the reverse."""

Progress = Callable[[int, int], None]
"""(bytes done, bytes in total)."""


def stream(
    entries: Mapping[str, TensorEntry],
    rules: Sequence[Rule],
    *,
    sizes: Mapping[str, int],
    num_layers: int,
    dtype: Any,
    shardings: Mapping[str, Sharding],
    progress: Progress | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Yield (our path, array in its sharding) rule by rule.

    A matrix without a sharding of its own is quantised block by block, into the two arrays that stand for it.
    Peak host memory beyond the arrays: two staging blocks, each at most ``STAGING_BYTES`` or one HF tensor.
    """
    total = sum(_bytes(entries, rule, sizes, num_layers) for rule in rules)
    done = 0
    with ThreadPoolExecutor(READERS) as readers:
        for rule in rules:
            if rule.path in shardings:
                placed: _Placement | _Quantising = _Placement(rule, num_layers, dtype, shardings[rule.path])
            else:
                placed = _Quantising(rule, num_layers, [shardings[row.path] for row in QUANTISED[rule.path]])
            for start, block in _blocks(entries, rule, sizes, num_layers, readers):
                placed.put(start, block)
                done += block.nbytes
                if progress:
                    progress(done, total)
            yield from placed.arrays()


def _bytes(entries: Mapping[str, TensorEntry], rule: Rule, sizes: Mapping[str, int], num_layers: int) -> int:
    columns = rule.column_range(sizes)
    whole = sum(entries[name].nbytes for name in rule.names(num_layers))
    return whole * (columns.stop - columns.start) // sizes[rule.shape[-1]]


def _blocks(
    entries: Mapping[str, TensorEntry],
    rule: Rule,
    sizes: Mapping[str, int],
    num_layers: int,
    readers: ThreadPoolExecutor,
) -> Iterator[tuple[int, np.ndarray]]:
    """(first layer, layers [n, *HF shape]) in the file's dtype; a tensor without layers comes alone, without n."""
    tensors = [entries[name] for name in rule.names(num_layers)]
    columns = rule.column_range(sizes)
    shape = rule.hf_shape(sizes)

    def read(entry: TensorEntry, target: np.ndarray) -> None:
        if rule.columns:
            whole = np.empty(shape, target.dtype)
            entry.read_into(whole)
            target[...] = whole[..., columns]
        else:
            entry.read_into(target)

    # Files may mix dtypes between layers; the widest one holds them all exactly.
    dtypes = {DTYPES[entry.dtype] for entry in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    width = (*shape[:-1], columns.stop - columns.start)
    count = max(1, min(len(tensors), STAGING_BYTES // (math.prod(width) * dtype.itemsize)))
    for start in range(0, len(tensors), count):
        group = tensors[start : start + count]
        block = np.empty((len(group), *width), dtype)

        def fill(index: int, group: list[TensorEntry] = group, block: np.ndarray = block) -> None:
            own = DTYPES[group[index].dtype]
            if own == block.dtype:
                read(group[index], block[index])
            else:
                narrow = np.empty(width, own)
                read(group[index], narrow)
                block[index] = narrow.astype(block.dtype)

        for _ in readers.map(fill, range(len(group))):
            pass
        yield start, (block if rule.stacked else block[0])


class _Placement:
    """One of our arrays growing on the devices, block by block."""

    def __init__(self, rule: Rule, num_layers: int, dtype: Any, sharding: Sharding) -> None:
        self.rule, self.num_layers, self.sharding = rule, num_layers, sharding
        self.dtype = BY_PATH[rule.path].dtype(dtype)
        self.on_host = next(iter(sharding.device_set)).platform in HOST_TRANSPOSES  # type: ignore[attr-defined]
        self.settle = jax.jit(self._arranged, out_shardings=sharding)
        self.insert = jax.jit(self._insert, donate_argnums=0, out_shardings=sharding)
        self.array: Any = None

    def put(self, start: int, block: np.ndarray) -> None:
        """Copy one block to the devices and into the array."""
        if self.array is not None:
            self.array.block_until_ready()  # bounds the blocks alive on the host
        whole = not self.rule.stacked or len(block) == self.num_layers
        shape = (self.num_layers, *self._arranged(block[:0]).shape[1:]) if not whole else None
        if self.on_host:
            moved = _to_devices(self._arranged(block), self.sharding)
        else:
            moved = _to_devices(block, spread(self._hf_sharding(), block.shape))
        if whole:
            self.array = moved if self.on_host else self.settle(moved)
            return
        if self.array is None:
            self.array = jax.jit(lambda: jnp.zeros(shape, self.dtype), out_shardings=self.sharding)()
        self.array = self.insert(self.array, moved, jnp.int32(start))

    def arrays(self) -> Iterator[tuple[str, jax.Array]]:
        """(path, array), complete once every block was put."""
        yield self.rule.path, self.array

    def _arranged(self, block: Any) -> Any:
        turned = block.swapaxes(-1, -2) if self.rule.transpose else block
        return turned if turned.dtype == self.dtype else turned.astype(self.dtype)

    def _insert(self, stack: Any, block: Any, start: Any) -> Any:
        block = block if self.on_host else self._arranged(block)
        return jax.lax.dynamic_update_slice_in_dim(stack, block, start, axis=0)

    def _hf_sharding(self) -> Sharding:
        """The sharding of a block that still lies as in the HF file."""
        if not self.rule.transpose or not isinstance(self.sharding, NamedSharding):
            return self.sharding
        spec = list(self.sharding.spec) + [None] * (len(self.rule.shape) + self.rule.stacked - len(self.sharding.spec))
        spec[-1], spec[-2] = spec[-2], spec[-1]
        return NamedSharding(self.sharding.mesh, PartitionSpec(*spec))


class _Quantising:
    """A matrix's values in e4m3 and their scales growing on the devices; what was read lies there one block at a time.

    HF stores matrices output-major, as the values stay.
    """

    def __init__(self, rule: Rule, num_layers: int, shardings: Sequence[Sharding]) -> None:
        self.rule, self.num_layers = rule, num_layers
        self.shardings = tuple(shardings)
        self.insert = jax.jit(self._insert, donate_argnums=0, out_shardings=self.shardings)
        self.pair: tuple[jax.Array, jax.Array] | None = None

    def put(self, start: int, block: np.ndarray) -> None:
        """Copy one block to the devices and quantise it into its place."""
        if self.pair is None:
            shape = (self.num_layers, *block.shape[1:])
            zeros = jax.jit(
                lambda: (jnp.zeros(shape, FP8), jnp.zeros(shape[:-1], jnp.float32)), out_shardings=self.shardings
            )
            self.pair = zeros()
        jax.block_until_ready(self.pair)  # bounds the blocks alive
        moved = _to_devices(block, spread(self.shardings[0], block.shape))
        self.pair = self.insert(self.pair, moved, jnp.int32(start))

    def arrays(self) -> Iterator[tuple[str, jax.Array]]:
        """(path, array) of values and scale."""
        assert self.pair is not None
        yield from zip((row.path for row in QUANTISED[self.rule.path]), self.pair, strict=True)

    def _insert(self, pair: tuple[Any, Any], block: Any, start: Any) -> tuple[Any, Any]:
        values, scale = quantise(block)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(pair[0], values, start, axis=0), put(pair[1], scale[..., 0], start, axis=0)


def _to_devices(block: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(block.shape, sharding, lambda index: block[index])

"""Runs launches of kernels in the Triton language through Triton's own interpreter, on the host.

The interpreter wants tensors of PyTorch; the few things that it asks of them are here for numpy, so that PyTorch is
not needed. Each array lies between margins of NaN (ints: -1): a write into them fails, a read from them spoils results.
bfloat16 is not here: the interpreter holds it as uint16 and multiplies those.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

MARGIN = 4096  # bytes
_host = ThreadPoolExecutor(1)  # one at a time: the interpreter replaces functions of triton.language while it runs
_host.submit(int).result()  # its thread starts here: those of XLA flush subnormal numbers, and theirs inherit that


class HostTensor:
    """A flat numpy array between margins, with those methods of a PyTorch tensor that the interpreter calls."""

    def __init__(self, array: np.ndarray):
        assert array.dtype.name in ("float16", "float32", "int32", "int8", "float8_e4m3fn"), array.dtype
        self.shape, self.dtype = array.shape, array.dtype
        self.bytes = np.full(2 * MARGIN + array.nbytes, 0xFF, np.uint8)
        self.bytes[MARGIN : MARGIN + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def data_ptr(self) -> int:
        return self.bytes.ctypes.data + MARGIN

    def untyped_storage(self) -> "HostTensor":
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    stride = cpu = lambda self: self

    def new_empty(self, size: int, device: str) -> "Alias":
        del size, device
        return Alias()

    def copy_(self, other: "HostTensor") -> None:
        assert other is self

    def array(self) -> np.ndarray:
        """The contents, once it is sure that the margins are as they were."""
        end = len(self.bytes) - MARGIN
        assert (self.bytes[:MARGIN] == 0xFF).all(), "a write before the first element"
        assert (self.bytes[end:] == 0xFF).all(), "a write behind the last element"
        return self.bytes[MARGIN:end].view(self.dtype).reshape(self.shape).copy()


class Alias:
    """What the interpreter takes for its copy on the host: the tensor itself."""

    def set_(self, storage: HostTensor, *_) -> None:
        self.storage, self.dtype = storage, storage.dtype

    def data_ptr(self) -> int:
        return self.storage.data_ptr()

    def untyped_storage(self) -> HostTensor:
        return self.storage


def run(launch, batch, arrays):
    """In place of `triton_launch.run`; works under jit, vmap and shard_map as jax-triton does."""
    shapes = tuple(jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in launch.outputs)

    def interpret(*arrays):
        return _host.submit(kernel, *(np.asarray(array) for array in arrays)).result()

    def kernel(*arrays):
        with np.errstate(all="ignore"):
            inputs = [HostTensor(array) for array in arrays]
            # Outputs start as NaN or an impossible number: what is not written shows.
            starts = (np.full(s.shape, np.nan if s.dtype.kind == "f" else -(10**6), s.dtype) for s in shapes)
            outputs = [HostTensor(start) for start in starts]
            launch.kernel[(*launch.blocks, batch)](*inputs, *outputs, **launch.constants)
            for before, after in zip(arrays, inputs, strict=True):
                np.testing.assert_array_equal(after.array(), before, "an input was written")
            return tuple(output.array() for output in outputs)

    return jax.pure_callback(interpret, shapes, *arrays)

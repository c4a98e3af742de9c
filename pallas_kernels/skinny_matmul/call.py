"""One validated call of skinny_matmul."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.compat import vary_together
from pallas_kernels.errors import KernelInputError
from pallas_kernels.float8 import FP8

Share = tuple[jax.Array | int, int]
"""(index, count): which of how many equal parts."""


@dataclass(frozen=True)
class MatmulCall:
    """x [R, I], stacks [L, I', O'] (in e4m3 [L, O', I']), place int32 [3]: layer, row share, column share (indices).

    Where nothing is cut place is [1], the layer alone, which needs no launch to be put together.
    ``row_shares``, ``column_shares``: into how many parts rows (inputs) and columns (outputs) of each matrix are cut.
    """

    x: jax.Array
    stacks: tuple[jax.Array, ...]
    place: jax.Array
    row_shares: int
    column_shares: int

    def __post_init__(self) -> None:
        x = self.x
        if x.ndim != 2:
            raise KernelInputError(f"x has shape {x.shape}; it must be [R, I]")
        if not self.stacks:
            raise KernelInputError("stacks is empty; give at least one [L, I', O']")
        inputs, outputs = (2, 1) if self.fp8 else (1, 2)
        for stack in self.stacks:
            if (stack.dtype == FP8) != self.fp8 or (not self.fp8 and stack.dtype != x.dtype):
                raise KernelInputError(
                    f"x and a stack have dtypes {x.dtype} and {stack.dtype}; they must agree, or all stacks be {FP8}"
                )
            if stack.ndim != 3 or stack.shape[inputs] != x.shape[1] * self.row_shares:
                sides = [f"{x.shape[1]} x {self.row_shares} shares", "O'"]
                wanted = ", ".join(["L", *(sides[::-1] if self.fp8 else sides)])
                raise KernelInputError(f"a stack has shape {stack.shape}; with x {x.shape} it must be [{wanted}]")
            if stack.shape[outputs] % self.column_shares:
                raise KernelInputError(f"{self.column_shares} shares do not divide {stack.shape[outputs]} columns")

    @property
    def fp8(self) -> bool:
        """Whether the matrices are in e4m3, output-major."""
        return self.stacks[0].dtype == FP8

    @property
    def cut(self) -> bool:
        """Whether ``place`` names shares beside the layer."""
        return self.place.shape[0] > 1

    @property
    def columns(self) -> tuple[int, ...]:
        """Of each result."""
        return tuple(stack.shape[1 if self.fp8 else 2] // self.column_shares for stack in self.stacks)

    def matrices(self) -> list[jax.Array]:
        """The matrices themselves, each [I, columns], in e4m3 [columns, I]: copies, unless XLA fuses them."""
        depth = self.x.shape[1]
        layer, row, column = self.place if self.cut else (*self.place, 0, 0)
        found = []
        for stack, width in zip(self.stacks, self.columns, strict=True):
            start, shape = (row * depth, column * width), (depth, width)
            if self.fp8:
                start, shape = start[::-1], shape[::-1]
            found.append(jax.lax.dynamic_slice(stack, (layer, *start), (1, *shape))[0])
        return found


def make_call(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    layer: jax.Array | int,
    row_share: Share | None,
    column_share: Share | None,
) -> MatmulCall:
    """Validate, and let all arrays vary over the same mesh axes."""
    (row, rows), (column, columns) = row_share or (0, 1), column_share or (0, 1)
    for name, value in (("layer", layer), ("row_share", row), ("column_share", column)):
        if jnp.shape(value) != ():
            raise KernelInputError(f"{name} has an index of shape {jnp.shape(value)}; it must be a scalar")
    cut = row_share is not None or column_share is not None
    place = jnp.stack([jnp.asarray(value, jnp.int32) for value in ((layer, row, column) if cut else (layer,))])
    x, matrices, place = vary_together((x, list(stacks), place))
    return MatmulCall(x, tuple(matrices), place, rows, columns)

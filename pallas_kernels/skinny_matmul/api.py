"""skinny_matmul: a few rows times matrices of one layer, read where they lie in their stacks."""

from collections.abc import Sequence

import jax

from pallas_kernels.dispatch import Implementation, accepts_all, choose
from pallas_kernels.skinny_matmul import mosaic_gpu as mosaic_backend
from pallas_kernels.skinny_matmul import triton as triton_backend
from pallas_kernels.skinny_matmul.call import Share, make_call
from pallas_kernels.skinny_matmul.reference import reference
from pallas_kernels.skinny_matmul.xla import xla

IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_backend.mosaic_gpu, mosaic_backend.refuse),
    Implementation("triton", triton_backend.triton, triton_backend.refuse),
    Implementation("xla", xla, accepts_all),
    Implementation("reference", reference, accepts_all, automatic=False),
)


def skinny_matmul(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    layer: jax.Array | int,
    *,
    row_share: Share | None = None,
    column_share: Share | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """``x @ stack[layer]`` for each of ``stacks``, or times a share of those matrices, without copying any of it.

    Args:
      x: [R, I], few rows: one for each request of a decoding step.
      stacks: each [L, I', O'], the same matrix of all layers, in the dtype of x; they may differ in O'. Or all in
        e4m3 and output-major, [L, O', I'], whose scales the caller multiplies the results by; x is not rounded.
      layer: int32 scalar.
      row_share, column_share: (index, count) for the ``index``-th of ``count`` equal parts of each matrix's rows or
        columns; the index is an int32 scalar, the count static. I is I' / count of ``row_share``.
      implementation: None for the automatic choice, or a name, which never falls back.

    Returns:
      For each stack float32 [R, O' / count of ``column_share``], accumulated in float32.

    Raises:
      KernelInputError, Unsupported, ExceptionGroup: as `flash_attention`.
    """
    call = make_call(x, stacks, layer, row_share, column_share)
    return choose("skinny_matmul", IMPLEMENTATIONS, implementation, call).run(call)

"""Probabilities from the accumulator of a product straight into the 8-bit operand of the next one, on Hopper.

A thread of a warpgroup holds columns 2t, 2t + 1 of every 8 of a float32 accumulator, and needs columns 4t ... 4t + 3 of
every 16 of an e4m3 operand. Nothing moves between threads if the keys of the values stand in another order instead:
inside each group of 16, new[4t + i] = old[2t + i] and new[4t + 2 + i] = old[8 + 2t + i] for i in {0, 1} (`KEY_ORDER`).
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils

GROUP = 16
KEY_ORDER = tuple(old for t in range(4) for old in (2 * t, 2 * t + 1, 8 + 2 * t, 8 + 2 * t + 1))
"""KEY_ORDER[new]: which key of its group of 16 stands at place ``new`` in the 8-bit values."""

JOIN = """
{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}
"""


def to_operand(p: jax.Array) -> jax.Array:
    """p float32 [64, N] in the accumulator's layout, N a multiple of 16, as e4m3 operand; keys in `KEY_ORDER`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def joined(_, p):
        word, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        number, layout = ir.F32Type.get(), mgpu.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape(p.shape), dtype=object)
        for place in np.ndindex(registers.shape):
            pairs = [p.registers[(place[0], 2 * place[1] + half, *place[2:])] for half in (0, 1)]
            values = [llvm.extractelement(pair, mgpu_utils.c(i, word)) for pair in pairs for i in (0, 1)]
            assert all(value.type == number for value in values)
            packed = llvm.inline_asm(word, values, JOIN, "=r,f,f,f,f")
            registers[place] = mgpu_utils.bitcast(packed, four)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return joined(p)

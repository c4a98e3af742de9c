"""Compiles every kernel in the Triton language to machine code without a GPU, and prints what came of it.

A process of its own: where Triton's interpreter is switched on, nothing can be compiled.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels import triton_launch
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles
from pallas_kernels.block_sparse_attention import triton as block_sparse_triton
from pallas_kernels.block_sparse_attention.call import make_call as block_sparse_call
from pallas_kernels.decode_attention import Codes
from pallas_kernels.decode_attention import triton as decode_triton
from pallas_kernels.decode_attention.call import make_call as decode_call
from pallas_kernels.device import Device, assume
from pallas_kernels.flash_attention import RowSegment
from pallas_kernels.flash_attention import triton as flash_triton
from pallas_kernels.flash_attention.call import make_call as flash_call
from pallas_kernels.skinny_matmul import triton as skinny_triton
from pallas_kernels.skinny_matmul.call import make_call as skinny_call

TYPES = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "int32": "*i32",
    "int8": "*i8",
    "float8_e4m3fn": "*fp8e4nv",
}


def launches_of(run, *shapes) -> list:
    """(launch, dtypes of its pointers) of every launch that ``run`` makes of arrays of these shapes."""
    seen = []

    def record(launch, batch, arrays):
        seen.append((launch, [a.dtype for a in arrays] + [dtype for _, dtype in launch.outputs]))
        return tuple(jnp.zeros((batch, *shape), dtype) for shape, dtype in launch.outputs)

    triton_launch.run = record
    jax.eval_shape(lambda *arrays: run(*arrays), *shapes)  # a new function: JAX remembers what it traced
    return seen


def compiled(launch, dtypes, capability: int):
    """The kernel as jax-triton compiles it: pointers aligned to 16 bytes, constants fixed."""
    names = launch.kernel.arg_names
    signature = {name: TYPES[jnp.dtype(dtype).name] for name, dtype in zip(names, dtypes, strict=False)}
    signature |= dict.fromkeys(names[len(dtypes) :], "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(dtypes))}
    source = ASTSource(launch.kernel, signature, launch.constants, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def flash(q, k, v, bounds):
    rows = RowSegment(130, bounds[0], bounds[1], bounds[2]), RowSegment(200, bounds[3], bounds[4], bounds[5])
    return flash_triton.forward(flash_call(q, k, v, rows, None))


def decode(q, k, v, k_scale, v_scale, lengths, offset, layer):
    codes = Codes(k, k_scale), Codes(v, v_scale)
    return decode_triton.triton(decode_call(q, *codes, lengths, offset, None, layer))


def skinny(x, layer, *stacks):
    return skinny_triton.triton(skinny_call(x, stacks, layer, None, None))


def cases(capability: int):
    """(function, shapes of its arguments) at the sizes of a prefill: the most registers and shared memory."""
    kv = tuple(array(1, length, 2, 128) for length in (70, 130, 200))
    yield flash, array(1, 330, 8, 128), kv, kv, array(6, dtype=jnp.int32)
    q, kv = array(1, 2000, 8, 128), array(1, 2000, 2, 128)
    for block, columns in ((64, True), (128, False)):
        lead = (1, 8, -(-2000 // block))
        entries, counts = array(*lead, 9, dtype=jnp.int32), array(*lead, dtype=jnp.int32)

        def run(q, k, v, *tiles, block=block):
            call = block_sparse_call(q, k, v, KeyTiles(*tiles), Blocks(block, block), 0, None)
            return block_sparse_triton.triton(call)

        yield run, q, kv, kv, *((entries, counts) * (1 + columns))

    for code in (jnp.int8, jnp.float8_e4m3fn) if capability >= 89 else (jnp.int8,):
        for rows, keys in ((1, 4096), (64, 4096), (64, 131072)):
            stack, scale = array(2, 1, keys, 8, 128, dtype=code), array(2, 1, keys, 8, dtype=jnp.float32)
            bound, layer = array(1, dtype=jnp.int32), array(dtype=jnp.int32)
            yield decode, array(1, rows, 32, 128), stack, stack, scale, scale, bound, bound, layer

    if capability >= 89:
        for rows in (2, 64):
            stacks = [array(2, outputs, 4096, dtype=jnp.float8_e4m3fn) for outputs in (4096, 1024, 1024)]
            yield skinny, array(rows, 4096), array(dtype=jnp.int32), *stacks


def main() -> None:
    rows = []
    for capability in map(int, sys.argv[1:]):
        for run, *shapes in cases(capability):
            with assume(Device("gpu", "a GPU", divmod(capability, 10))):
                launches = launches_of(run, *shapes)
            for launch, dtypes in launches:
                kernel = compiled(launch, dtypes, capability)
                rows.append(
                    {
                        "kernel": launch.name,
                        "capability": capability,
                        "target": kernel.asm["ptx"].split(".target ")[1].split()[0],
                        "shared_bytes": kernel.metadata.shared,
                        "machine_code_bytes": len(kernel.asm["cubin"]),
                    }
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

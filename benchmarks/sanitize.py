"""Each GPU kernel once, small: `compute-sanitizer --tool memcheck python -m benchmarks.sanitize [kernel ...]`."""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import RowSegment, flash_attention
from pallas_kernels.skinny_matmul import skinny_matmul


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def flash(implementation):
    q, k, v = normal(0, 1, 300, 4, 64), *((normal(s, 1, 40, 2, 64), normal(s + 1, 1, 300, 2, 64)) for s in (1, 3))
    rows = (RowSegment(300, jnp.int32(13), 40, 340),)
    return flash_attention(q, k, v, rows, implementation=implementation)


def decode(implementation):
    q, k, v = normal(0, 1, 1, 8, 64), normal(1, 3, 1, 600, 2, 64), normal(2, 3, 1, 600, 2, 64)
    return decode_attention(q, k, v, 577, layer=1, implementation=implementation)


def skinny(implementation):
    stacks = normal(1, 2, 576, 192), normal(2, 2, 576, 64)
    return skinny_matmul(normal(0, 3, 576), stacks, 1, implementation=implementation)


def sparse(implementation):
    q, k, v = normal(0, 1, 150, 4, 64), normal(1, 1, 150, 2, 64), normal(2, 1, 150, 2, 64)
    starts = jnp.broadcast_to(jnp.array([-7, 60, 124], jnp.int32), (1, 4, 3, 3))
    counts, columns = jnp.full((1, 4, 3), 3, jnp.int32), jnp.full((1, 4, 3, 1), 58, jnp.int32)
    tiles = KeyTiles(starts, counts, columns, jnp.ones((1, 4, 3), jnp.int32))
    return block_sparse_attention(q, k, v, tiles, blocks=Blocks(64, 64), implementation=implementation)


KERNELS = {
    "flash_mosaic": (flash, "mosaic_gpu"),
    "decode_mosaic": (decode, "mosaic_gpu"),
    "skinny_mosaic": (skinny, "mosaic_gpu"),
    "flash_triton": (flash, "triton"),
    "sparse_triton": (sparse, "triton"),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or KERNELS:
        run, implementation = KERNELS[name]
        jax.block_until_ready(jax.jit(run, static_argnums=0)(implementation))
        print(f"{name}: ran", flush=True)

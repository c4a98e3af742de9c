"""Decoding over an 8-bit cache in the Triton language, for NVIDIA GPUs of compute capability 8.9 (e4m3) or 8.0 (int8).

The keys are split over the chip as in Flash-Decoding; the device's half is `triton_kernel`.
"""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.decode_attention.call import DecodeCall
from pallas_kernels.decode_attention.parts import Parts, packed
from pallas_kernels.device import Device, current, refuse_before_ada, refuse_before_ampere

LOG2_E = math.log2(math.e)
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Config:
    """Keys a step, steps in flight, warps, blocks of threads per multiprocessor."""

    block_keys: int = 64
    stages: int = 4
    warps: int = 4
    blocks_per_multiprocessor: int = 2


LONG = Config(block_keys=128, stages=3)
LONG_KEYS = 32768
"""From so many keys on ``LONG`` is taken, on Hopper: measured at 8K and 128K, not between them."""


def refuse(call: DecodeCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    if not call.quantised:
        return f"reads caches of 8 bits, k has {call.k.dtype}"
    old = refuse_before_ampere if call.k.dtype == jnp.int8 else refuse_before_ada
    if reason := old(device) or triton_launch.refuse(device):
        return reason
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {call.q.dtype}"
    if (dim := call.q.shape[-1]) not in (16, 32, 64, 128, 256):
        return f"takes head dimension 16, 32, 64, 128 or 256, q has {dim}"
    return None


def _config(call: DecodeCall, device: Device) -> Config:
    hopper = (device.compute_capability or (0, 0)) >= (9, 0)  # blocks before it have too little shared memory
    return LONG if hopper and call.keys >= LONG_KEYS else Config()


def triton(call: DecodeCall, config: Config | None = None) -> Parts:
    """Attention of packed rows, the keys split over the chip."""
    from pallas_kernels.decode_attention.triton_kernel import decode_8bit

    assert call.k_scale is not None
    assert call.v_scale is not None
    config = config or _config(call, current())
    batch, rows, heads, dim = call.q.shape
    keys, kv_heads = call.keys, call.kv_heads
    q = packed(call.q, kv_heads)
    stack = [a.reshape(-1, *a.shape[2:]) if call.layer is not None else a for a in (call.k, call.v)]
    scales = [a.reshape(-1, *a.shape[2:]) if call.layer is not None else a for a in (call.k_scale, call.v_scale)]
    layer = jnp.zeros((1,), jnp.int32) if call.layer is None else call.layer[None]
    causal = call.causal_offset is not None
    offset = call.lengths if call.causal_offset is None else call.causal_offset
    tile = min(64, max(16, 1 << (q.shape[2] - 1).bit_length()))
    places = kv_heads * -(-q.shape[2] // tile)
    wanted = MULTIPROCESSORS * config.blocks_per_multiprocessor // (batch * places)
    parts = max(1, min(wanted, -(-keys // config.block_keys)))
    shape = kv_heads, parts, q.shape[2]
    launch = triton_launch.Launch(
        name="decode_8bit",
        kernel=decode_8bit,
        blocks=(places, parts),
        outputs=(((*shape, dim), jnp.float32), (shape, jnp.float32)),
        num_warps=config.warps,
        num_stages=config.stages,
        constants={
            "BATCH": batch,
            "LAYERS": 1 if call.layer is None else call.k.shape[0],
            "KEYS": keys,
            "KV_HEADS": kv_heads,
            "ROWS": q.shape[2],
            "GROUP": heads // kv_heads,
            "DIM": dim,
            "TILE": tile,
            "PARTS": parts,
            "BLOCK": config.block_keys,
            "INT8": call.k.dtype == jnp.int8,
            "CAUSAL": causal,
            "SCALE": call.scale * LOG2_E,
            "LOG2_E": LOG2_E,
        },
    )
    out, lse = triton_launch.call(launch, q, *stack, *scales, call.lengths, offset, layer)
    return Parts(out, lse, rows)

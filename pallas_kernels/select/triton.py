"""Selection on any NVIDIA GPU in the Triton language; the device's half is `triton_kernel`."""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.device import Device
from pallas_kernels.select.call import SelectCall
from pallas_kernels.select.xla import gather

MOST_ROWS = 32768  # one program holds them all in registers, and two 16-bit counts share a word
PLACE_ROWS = 64  # rows that a program of the second kernel places
PLACE_CHUNK = 1024  # rows that it compares them with at once


def refuse(call: SelectCall, device: Device) -> str | None:
    """Why the kernels cannot serve the call on the device, or None if they can."""
    if reason := triton_launch.refuse(device):
        return reason
    if call.scores.dtype != jnp.float32:
        return f"takes float32 scores, not {call.scores.dtype}"
    if (rows := call.scores.shape[1]) > MOST_ROWS:
        return f"takes up to {MOST_ROWS} rows, there are {rows}"
    if (dim := call.k.shape[-1]) & (dim - 1):
        return f"takes head dimensions that are powers of two, not {dim}"
    return None


def forward(call: SelectCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """index [B, count, K], k_sel and v_sel [B, count, K, D]; not differentiable."""
    from pallas_kernels.select.triton_kernel import choose_rows, place_rows

    _, rows, heads = call.scores.shape
    count, dim = call.count, call.k.shape[-1]
    sizes = {"ROWS": rows, "HEADS": heads, "COUNT": count}
    chosen = (heads, count), jnp.int32
    choose = triton_launch.Launch(
        name="select_choose_rows",
        kernel=choose_rows,
        blocks=(heads, 1),
        outputs=(chosen, chosen),
        num_warps=8,
        num_stages=1,
        constants={**sizes, "WIDTH": 1 << (rows - 1).bit_length()},
    )
    kept = (count, heads, dim), call.k.dtype
    place = triton_launch.Launch(
        name="select_place_rows",
        kernel=place_rows,
        blocks=(heads, -(-count // PLACE_ROWS)),
        outputs=(((count, heads), jnp.int32), kept, kept),
        num_warps=4,
        num_stages=1,
        constants={**sizes, "DIM": dim, "PLACE_ROWS": PLACE_ROWS, "PLACE_CHUNK": PLACE_CHUNK},
    )
    index, k, v = triton_launch.call(place, *triton_launch.call(choose, call.scores), call.k, call.v)
    return index, k, v


def triton(call: SelectCall) -> tuple[jax.Array, jax.Array, jax.Array]:
    """index [B, count, K], k_sel and v_sel [B, count, K, D], differentiable with respect to k and v."""

    @jax.custom_vjp
    def select(scores, k, v):
        return forward(SelectCall(scores, k, v, call.count))

    def select_forward(scores, k, v):
        index, *rows = select(scores, k, v)
        return (index, *rows), (scores, index, k, v)

    def select_backward(saved, gradients):
        scores, index, k, v = saved
        pulled = (
            jax.vjp(lambda a: gather(a, index), array)[1](gradient)[0]
            for array, gradient in zip((k, v), gradients[1:], strict=True)
        )
        return (jnp.zeros_like(scores), *pulled)

    select.defvjp(select_forward, select_backward)
    return select(call.scores, call.k, call.v)

"""A gradient for kernels that only know the forward direction."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.device import current
from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.rows import split_rows
from pallas_kernels.flash_attention.xla_chunked import xla_chunked


def with_recomputed_gradient(
    forward: Callable[[AttentionCall], tuple[jax.Array, jax.Array]], call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """``forward(call)``, differentiable with respect to q, k and v.

    The backward pass recomputes the attention: with one cuDNN call where that can express it and only ``out``
    is differentiated (plain causal training), else with `xla_chunked` (linear in memory, correct, not tuned).
    """
    bounds, rebuild = split_rows(call.rows)

    def with_arrays(q, k, v, bounds):
        return dataclasses.replace(call, q=q, k=k, v=v, rows=rebuild(bounds))

    @jax.custom_vjp
    def attend(*arrays):
        return forward(with_arrays(*arrays))

    def attend_forward(*arrays):
        arrays = jax.tree.map(lambda primal: primal.value, arrays)
        return attend(*arrays), arrays

    def attend_backward(arrays, gradients):
        q, k, v, bounds = arrays
        only_out = isinstance(gradients[1], SymbolicZero)
        recompute = cudnn.one_call if only_out and cudnn.is_one_call(call, current()) else xla_chunked
        _, pullback = jax.vjp(
            lambda q, k, v: recompute(dataclasses.replace(with_arrays(q, k, v, bounds), eight=None)), q, k, v
        )
        gradients = tuple(jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in gradients)
        return (*pullback(gradients), [None] * len(bounds))

    attend.defvjp(attend_forward, attend_backward, symbolic_zeros=True)
    return attend(call.q, call.k, call.v, bounds)


def cudnn_attention(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """One cuDNN call where that suffices, with cuDNN's backward pass; else several, merged by log-sum-exp."""
    if cudnn.is_one_call(call, current()):
        return cudnn.one_call(call)
    return with_recomputed_gradient(cudnn.compose, call)

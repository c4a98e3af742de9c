"""What retaining heads are trained on: how much the rest of a conversation looks at each token of its prompt.

Locret (arXiv 2410.01805, ``train/data_gen.py``): the label of prompt token k for a layer and KV head is the largest
scaled logit ``q_i . k_k / sqrt(D)`` before the softmax, over all answer rows i and the group's query heads, after RoPE.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import LayerInputs
from apb_jax.model.transformer import Transformer
from apb_jax.precision import precision_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """A prompt and its answer, padded: what one training step reads.

    ``prompt_tokens`` and ``total_tokens`` count real tokens; ``prompt_rows`` >= prompt_tokens and ``answer_rows`` >=
    total_tokens - prompt_tokens are static sizes, which a program is compiled for.
    """

    tokens: Int[Array, "1 S"]
    prompt_tokens: Int[Array, ""]
    total_tokens: Int[Array, ""]
    prompt_rows: int = field(metadata={"static": True})
    answer_rows: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Traces:
    """What one frozen forward leaves for training: pre-RoPE projections of the prompt rows, and their labels."""

    q: Float[Array, "L 1 T H D"]
    k: Float[Array, "L 1 T K D"]
    v: Float[Array, "L 1 T K D"]
    labels: Float[Array, "L K T"]


def attention_labels(
    q: Float[Array, "B R H D"], k: Float[Array, "B T K D"], row_exists: Float[Array, " R"]
) -> Float[Array, "B K T"]:
    """Labels of T keys from R answer rows (rows whose ``row_exists`` is False do not count); float32."""
    batch, rows, heads, dim = q.shape
    groups = q.reshape(batch, rows, k.shape[2], heads // k.shape[2], dim)
    precision = precision_of(k.dtype)
    logits = jnp.einsum("brkgd,btkd->bkrgt", groups, k, precision=precision, preferred_element_type=jnp.float32)
    logits = logits * dim**-0.5
    return jnp.max(jnp.where(row_exists[None, None, :, None, None], logits, -jnp.inf), axis=(2, 3))


def causal_attention(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], v: Float[Array, "B S K D"]
) -> Float[Array, "B S H D"]:
    """Plain causal attention: cuDNN on a GPU in 16-bit types, XLA elsewhere."""
    cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    with jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext():
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if cudnn else "xla")


def trace(graph: nnx.GraphDef, weights: nnx.State, sample: Sample) -> Traces:
    """One forward of the frozen model over a sample; of what comes back, rows past the real ones mean nothing."""
    model: Transformer = nnx.merge(graph, weights)
    config = model.config
    n, kv, dim = config.num_layers, config.num_kv_heads, config.head_dim
    dtype = model.embedding[...].dtype
    tokens, prompt_rows = sample.tokens, sample.prompt_rows
    empty = Traces(
        q=jnp.zeros((n, 1, prompt_rows, config.num_heads, dim), dtype),
        k=jnp.zeros((n, 1, prompt_rows, kv, dim), dtype),
        v=jnp.zeros((n, 1, prompt_rows, kv, dim), dtype),
        labels=jnp.zeros((n, kv, prompt_rows), jnp.float32),
    )
    rows = sample.prompt_tokens + jnp.arange(sample.answer_rows, dtype=jnp.int32)
    inside = jnp.minimum(rows, sample.total_tokens - 1)

    def attend(inputs: LayerInputs, so_far: Traces) -> tuple[Float[Array, "B S H D"], Traces]:
        q, k = inputs.rotated()
        labels = attention_labels(q[:, inside], k[:, :prompt_rows], rows < sample.total_tokens)[0]
        at = inputs.layer
        so_far = Traces(
            q=so_far.q.at[at].set(inputs.q[:, :prompt_rows]),
            k=so_far.k.at[at].set(inputs.k[:, :prompt_rows]),
            v=so_far.v.at[at].set(inputs.v[:, :prompt_rows]),
            labels=so_far.labels.at[at].set(labels),
        )
        return causal_attention(q, k, inputs.v), so_far

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    _, traces = model.run_layers(model.embed(tokens), positions, attend, empty)
    return jax.lax.stop_gradient(traces)

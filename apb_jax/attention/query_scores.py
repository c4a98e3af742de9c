"""The training-free scorer: what the embedded query attends to, in place of retaining heads.

In the manner of SnapKV (arXiv 2404.14469) and Spava (arXiv 2601.21444): the query stands in every shard's anchor, so
its last tokens can be asked, before the exchange, which keys of the block they would look at from the document's end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.precision import precision_of
from apb_jax.rope.base import rotate

WINDOW = 64
"""Query tokens asked at most (the last ones); bounds the memory of the scores."""


def query_scores(
    q: Float[Array, "B A H D"],
    k: Float[Array, "B C K D"],
    *,
    query_at: int,
    query_tokens: Int[Array, " B"],
    cos: Float[Array, "B W Dhalf"],
    sin: Float[Array, "B W Dhalf"],
    block_rows: Int[Array, " B"],
) -> Float[Array, "B C K"]:
    """Attention mass that each block key gets from the query, summed over query rows and the heads of a group.

    ``q``: anchor rows before RoPE; ``k``: block keys after RoPE; ``cos``/``sin``: rotation of the W asked rows at their
    true positions behind the document. The softmax runs over the local block; rows past ``block_rows`` get 0.
    """
    window = cos.shape[1]
    last = query_at + query_tokens[:, None] - window + jnp.arange(window, dtype=jnp.int32)[None]
    asked = jnp.take_along_axis(q, jnp.clip(last, 0, q.shape[1] - 1)[:, :, None, None], axis=1)
    asked = rotate(asked, cos, sin)
    batch, _, heads, dim = asked.shape
    groups = asked.reshape(batch, window, k.shape[2], heads // k.shape[2], dim)
    precision = precision_of(k.dtype)
    logits = jnp.einsum("bwkgd,bckd->bwkgc", groups, k, precision=precision, preferred_element_type=jnp.float32)
    logits = logits * dim**-0.5
    exists = jnp.arange(k.shape[1], dtype=jnp.int32)[None] < block_rows[:, None]
    mass = jax.nn.softmax(jnp.where(exists[:, None, None, None], logits, -jnp.inf), axis=-1)
    real = last >= query_at  # a query shorter than the window leaves its first rows empty
    return jnp.sum(jnp.where(real[:, :, None, None, None], mass, 0.0), axis=(1, 3)).swapaxes(1, 2)

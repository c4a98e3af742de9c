"""A training-free scorer that knows no question: which keys a repetition of the text would look at (KVzip).

In the manner of KVzip (Kim et al., arXiv 2505.23416): a key matters if the model needs it to say the context again. A
score is the largest attention probability that any query of the repeated chunk, of any head of the group, gives a key.
Its chunk size (2,048 there) is ``CHUNK``.
Simplified: the paper prefills first and then runs the text through all layers once more behind a request to repeat it.
Here a chunk's own queries of the first reading stand in for those of the repetition, rotated to positions behind the
document, and look at the keys of their chunk alone; no second reading takes place and nothing else is exchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apb_jax.rope.base import rotate

CHUNK = 512


def reconstruct_scores(
    q: Float[Array, "B C H D"],
    k: Float[Array, "B C K D"],
    *,
    cos: Float[Array, "B M Dhalf"],
    sin: Float[Array, "B M Dhalf"],
    block_rows: Int[Array, " B"],
) -> Float[Array, "B C K"]:
    """The largest probability of every block key among the queries of its chunk of M rows (the last may be shorter).

    ``q``: block rows before RoPE; ``k``: after RoPE; ``cos``/``sin``: rotations of the M positions behind the document,
    the same for every chunk. Only the first ``block_rows`` rows exist; the others get 0.
    """
    batch, rows, heads, dim = q.shape
    groups, chunk = k.shape[2], cos.shape[1]
    count = -(-rows // chunk)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - rows), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def one(part: tuple[Array, Array, Array]) -> Array:
        first, queries, keys = part
        exists = first + jnp.arange(chunk, dtype=jnp.int32)[None] < block_rows[:, None]
        asked = rotate(queries, cos, sin).reshape(batch, chunk, groups, heads // groups, dim)
        logits = jnp.einsum("bmkgd,bckd->bkgmc", asked, keys, preferred_element_type=jnp.float32) * dim**-0.5
        # A finite least value: a chunk that does not exist at all has a softmax too.
        mass = jax.nn.softmax(jnp.where(exists[:, None, None, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
        best = jnp.max(jnp.where(exists[:, None, None, :, None], mass, 0.0), axis=(2, 3))
        return jnp.where(exists[..., None], best.swapaxes(1, 2), 0.0)

    firsts = jnp.arange(count, dtype=jnp.int32) * chunk
    scores = jax.lax.map(one, (firsts, cut(q), cut(k)))
    return jnp.moveaxis(scores, 0, 1).reshape(batch, count * chunk, groups)[:, :rows]

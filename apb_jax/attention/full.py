"""Full causal attention: on one shard plain, on several with every shard's KV gathered. The truth for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from apb_jax.attention.attend import Keys, attend, project
from apb_jax.attention.consecutive import causal
from apb_jax.attention.inputs import KeptKV, Kernels, LayerInputs, Prompt, Shard
from apb_jax.attention.layout import Layout, chunk_layout
from apb_jax.attention.method import AttentionMethod, Capabilities
from pallas_kernels.flash_attention import RowSegment


def gather_document(keys: Keys, shard: Shard) -> Keys:
    """Every shard's block in document order (blocks are equally long); one ``all_gather``, two under STRING."""
    if shard.count == 1:
        return keys

    def gather(x: Array) -> Array:
        return shard.placement.all_gather(x, axis=1, tiled=True)

    k, v = jnp.split(gather(jnp.concatenate([keys.k, keys.v], axis=-1)), 2, axis=-1)
    return Keys(k, v, None if keys.positions is None else gather(keys.positions))


@dataclass(frozen=True)
class Full(AttentionMethod):
    """Every row sees every earlier token. Sharded, each layer gathers the whole KV: memory grows with the document."""

    name: ClassVar[str] = "full"
    can: ClassVar[Capabilities] = Capabilities(
        exact=True,
        paper="Vaswani et al. 2017, arXiv 1706.03762",
        gathers=True,
        tested=("recordings", "transformers", "shards agree"),
    )

    def layout(self, prompts: Sequence[Prompt], shards: int) -> Layout:
        return chunk_layout(prompts, np.arange(shards)[:, None])

    def prefill(self, x: LayerInputs, shard: Shard, kernels: Kernels) -> tuple[Float[Array, "B S H D"], KeptKV]:
        queries, keys = project(x)
        if shard.count == 1:
            out, _ = causal(queries, keys, kernels)
            return out, (keys.k, keys.v)
        everything = gather_document(keys, shard)
        rows = RowSegment(queries.rows, start=0, offset=shard.index * queries.rows, end=everything.tokens)
        out, _ = attend(queries, (everything,), (rows,), kernels)
        return out, (keys.k, keys.v)

"""Recovered attention mass: how much of full attention's softmax falls on keys that a method's rows saw.

With Z the sum of exponentiated scores over the keys that a row sees, the share is Z_method / Z_full. The method runs as
it is: in place of V it gets, for every sampled row, a channel that is 1 at the row's own key and 0 elsewhere (also on
the other shards, so shards times rows channels are needed). What comes out is the weight of that key,
exp(s) / Z_method; exp(s) / Z_full is computed directly. Shares are cut off at 1: an anchor stands for the document's
start, and with the query in it may weigh more than that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apb_jax.attention.inputs import Kernels, LayerInputs, Shard
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.mesh import SP, TP, to_host
from apb_jax.model.config import ModelConfig
from apb_jax.model.heads import FoldedRetainingHead
from apb_jax.prefill import PrefillRows, each_shard
from apb_jax.session import Session

ROWS = 16
"""Document rows sampled on every shard, evenly over its block; fewer where the head dimension has no more channels."""
ALL = 0.999
"""A head whose sampled rows all recover this share saw everything that mattered."""


@dataclass(frozen=True)
class RecoveredMass:
    """Shares of sampled rows; ``shares`` is float32 [L, H, rows]."""

    shares: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Mean, mean by layer, and how many heads saw everything that mattered."""
        by_layer = self.shares.mean(axis=(1, 2))
        whole = (self.shares >= ALL).all(axis=2)
        return {
            "rows": self.shares.shape[2],
            "mean": float(self.shares.mean()),
            "lowest": float(self.shares.min()),
            "by_layer": [round(float(x), 4) for x in by_layer],
            "whole_heads": int(whole.sum()),
            "heads": whole.size,
        }


def why_not(method: AttentionMethod, config: ModelConfig, shards: int) -> str | None:
    """Why the mass is not defined, or cannot be measured, under this method and rope; None where it can."""
    if shards > config.head_dim:
        return f"{shards} shards are more than the {config.head_dim} channels of a head"
    if not method.can.true_positions:
        return f"{method.name} moves keys to other positions, so its scores are not full attention's"
    if config.rope.kind == "string":
        return "--rope string moves keys to other positions"
    return None


def sample_rows(layout: Layout, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(local row indices int32 [B, N, R], which of them are rows of the document, bool [B, N, R])."""
    count = min(ROWS, head_dim // layout.shards)
    first = sum(rows for _, rows in layout.segments[:-1])
    batch, shards, _ = layout.tokens.shape
    index = np.full((batch, shards, count), first, np.int32)
    real = np.zeros(index.shape, bool)
    places = layout.positions[:, :, first:]
    for b in range(batch):
        for r in range(shards):
            prefix = np.arange(places.shape[2]) < layout.kept_tokens[b, r]
            rows = np.flatnonzero(prefix & (places[b, r] < layout.document_tokens[b]))
            if len(rows):
                chosen = rows[np.maximum(np.arange(1, count + 1) * len(rows) // count - 1, 0)]
                index[b, r], real[b, r] = first + chosen, True
    return index, real


def recovered_mass(session: Session) -> RecoveredMass | None:
    """How much of full attention's mass the method's prefill saw; None where that is not defined.

    Runs the prefill once more, with twice the attention; sampled rows of all requests and shards together.
    """
    engine, programs, layout = session.engine, session.engine.programs, session.layout
    config, method = engine.model.config, session.method
    if why_not(method, config, session.layout.shards) is not None:
        return None
    index, real = sample_rows(layout, config.head_dim)
    placement = session.lengths.placement
    inputs = PrefillRows(programs.place_rows(layout.positions, placement), session.lengths)

    def recover(weights: Any, tokens: Any, inputs: PrefillRows, sampled: Any) -> Any:
        lengths, model = inputs.lengths, programs.model(weights)

        def one_shard(x: LayerInputs, rows: Any) -> Any:
            shard = lengths.shard()
            out, (k, _) = method.prefill(x, shard, programs.kernels)
            kept = (k, lengths.kept(shard), lengths.positions_of(shard))
            return out, layer_shares(method, x, kept, rows, shard, programs.kernels)

        def attend(x: LayerInputs, shares: Any) -> tuple[Any, Any]:
            out, found = each_shard(placement, one_shard, x, sampled)
            return out, shares.at[x.layer].set(found)

        heads = config.num_heads // engine.mesh.shape[TP]
        shares = jnp.zeros((config.num_layers, *sampled.shape, heads), jnp.float32)
        return model.run_layers(model.embed(tokens), inputs.positions, attend, shares, where=programs.where)[1]

    local = P(None, SP)
    specs = PrefillRows(local, P())  # type: ignore[arg-type]
    make = lambda: programs.traced(recover, (programs.specs, local, specs, local), P(None, None, SP, TP))  # noqa: E731
    tokens, sampled = (programs.place_rows(a, placement) for a in (layout.tokens, index))
    shares = programs.call("recovered", method, make, (engine.state, tokens, inputs, sampled))
    chosen = real[:, placement.order_of_rows].reshape(len(session.prompts), -1)
    host = to_host(shares)[:, chosen]  # [L, rows, H]
    return RecoveredMass(np.minimum(np.moveaxis(host, 2, 1), 1.0))


def layer_shares(
    method: AttentionMethod,
    x: LayerInputs,
    block: tuple[Float[Array, "B C K D"], Int[Array, " B"], Int[Array, "B C"]],
    rows: Int[Array, "B R"],
    shard: Shard,
    kernels: Kernels,
) -> Float[Array, "B R H"]:
    """Shares of the local ``rows`` in one layer, float32, inside ``shard_map``; not cut off at 1.

    ``block``: its keys (rotated), how many of them exist, and their positions. Memory: the scores of R rows against the
    whole document, and the gathered keys.
    """
    k_kept, kept, kept_positions = block
    batch = jnp.arange(x.q.shape[0])[:, None]
    channel = shard.index * rows.shape[1] + jnp.arange(rows.shape[1])[None]
    head = x.retaining
    if head is not None:  # it reads V too, and must choose as it does in earnest
        head = FoldedRetainingHead(head.hidden(x.q, x.k, x.v, x.tp_axis), head.fc2)
    probe = jnp.zeros_like(x.v).at[batch, rows, :, channel].set(1)
    seen = method.prefill(replace(x, v=probe, retaining=head), shard, kernels)[0]
    weight = seen[batch, rows, :, channel].astype(jnp.float32)  # [B, R, H]

    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    q, k = (y[batch, rows] for y in x.rotated())  # [B, R, H, D], [B, R, K, D]
    scale = jnp.float32(q.shape[3] ** -0.5)
    q = q.reshape(*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    own = product("brkgd,brkd->brkg", q, k) * scale
    gather = lambda y: shard.placement.all_gather(y, axis=1, tiled=True)  # noqa: E731
    exists = jnp.arange(k_kept.shape[1], dtype=jnp.int32) < kept[:, None]
    keys, places = gather(k_kept), gather(jnp.where(exists, kept_positions, jnp.iinfo(jnp.int32).max))
    scores = product("brkgd,bckd->brkgc", q, keys) * scale
    position = jnp.take_along_axis(x.positions, rows, axis=1)
    visible = places[:, None] <= position[..., None]  # [B, R, C]
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    full = jnp.exp(own - jax.nn.logsumexp(scores, axis=-1)).reshape(weight.shape)
    return full / weight

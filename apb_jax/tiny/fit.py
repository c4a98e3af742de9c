"""The training step of the tiny model, its length curriculum, and the checkpoint it leaves behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from apb_jax.attention.inputs import LayerInputs
from apb_jax.files import whole_file, write_json
from apb_jax.model.config import ModelConfig
from apb_jax.model.transformer import Transformer
from apb_jax.rope.default import DefaultRope
from apb_jax.tiny.tokenizer import BOS_ID, EOS_ID

CONFIG = ModelConfig(
    family="llama", vocab_size=4096, hidden_size=256, intermediate_size=640, num_layers=8, num_heads=4,
    num_kv_heads=2, head_dim=64, rope=DefaultRope(500000.0), rms_norm_eps=1e-5, max_positions=32768,
    tie_embeddings=True, bos_id=BOS_ID, eos_ids=(EOS_ID,),
)  # fmt: skip
"""The packaged model: 6.56M parameters."""

CURRICULUM: tuple[tuple[float, dict[int, float]], ...] = (
    (0.00, {256: 0.7, 1024: 0.3}),
    (0.15, {256: 0.2, 1024: 0.6, 4096: 0.2}),
    (0.40, {256: 0.1, 1024: 0.4, 4096: 0.5}),
    (0.65, {256: 0.05, 1024: 0.2, 4096: 0.35, 8192: 0.3, 16384: 0.1}),
)
"""From which share of the training time on, which row lengths with which probability."""

LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 2e-3, 200, 0.1


def rows_of(length: int, scale: float = 1.0) -> int:
    """Rows of a batch: 32K tokens a step up to rows of 1K tokens, 65K above."""
    return max(1, int((32768 if length <= 1024 else 65536) * scale) // length)


def row_length(rng: np.random.Generator, progress: float, lengths: tuple[int, ...] | None = None) -> int:
    """The length of the next batch at ``progress`` (0..1); ``lengths`` restricts the curriculum to some of its own."""
    shares = [s for start, s in CURRICULUM if start <= progress][-1]
    if lengths:
        shares = {n: p for n, p in shares.items() if n in lengths} or {max(lengths): 1.0}
    p = np.asarray(list(shares.values()))
    return int(rng.choice(list(shares), p=p / p.sum()))


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine to 1% by training time."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


def attend_full(inputs: LayerInputs, carry: None) -> tuple[Float[Array, "B S H D"], None]:
    """Causal attention within a row: cuDNN on a GPU, XLA elsewhere."""
    q, k = inputs.rotated()
    on_gpu = jax.default_backend() == "gpu"
    out = jax.nn.dot_product_attention(q, k, inputs.v, is_causal=True, implementation="cudnn" if on_gpu else "xla")
    return out, carry


def compute_dtype() -> Any:
    """bfloat16 on a GPU, float32 elsewhere."""
    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


def forward(
    graph: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "B S"], positions: Int[Array, "B S"]
) -> Float[Array, "B S V"]:
    """Logits, float32, from float32 weights computed in ``compute_dtype``."""
    model = nnx.merge(graph, jax.tree.map(lambda w: w.astype(compute_dtype()), weights))
    x, _ = model.run_layers(model.embed(tokens), positions, attend_full, None)
    return model.logits(x)


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the clock and is applied by the step."""
    decayed = lambda tree: jax.tree.map(lambda w: w.ndim > 2 or w.shape[0] > 1024, tree)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=decayed),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    graph: nnx.GraphDef,
    weights: nnx.State,
    moments: optax.OptState,
    tokens: Int[Array, "B S1"],
    positions: Int[Array, "B S1"],
    importance: Float[Array, "B S"],
    rate: Float[Array, ""],
) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
    """One update; the loss is the importance-weighted mean cross entropy."""

    def loss_of(weights: nnx.State) -> Float[Array, ""]:
        logits = forward(graph, weights, tokens[:, :-1], positions[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * importance) / jnp.maximum(jnp.sum(importance), 1.0)

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    updates, moments = optimizer().update(gradient, moments, weights)
    weights = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
    return weights, moments, loss


@partial(jax.jit, static_argnums=0)
def predictions(
    graph: nnx.GraphDef, weights: nnx.State, tokens: Int[Array, "B S"], positions: Int[Array, "B S"]
) -> Int[Array, "B S"]:
    """The greedy next token at every place. An answer is decoded exactly iff all its tokens are predicted here."""
    return jnp.argmax(forward(graph, weights, tokens, positions), axis=-1)


def initial(seed: int, config: ModelConfig = CONFIG) -> tuple[nnx.GraphDef, nnx.State, optax.OptState]:
    """Graph, float32 weights and optimizer state."""
    model = Transformer(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graph, weights = nnx.split(model)
    weights = jax.tree.map(jnp.asarray, weights)
    return graph, weights, optimizer().init(weights)


HF_NAMES = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def hf_tensors(graph: nnx.GraphDef, weights: nnx.State) -> dict[str, np.ndarray]:
    """bfloat16 tensors under the names, and in the (out, in) order, of a HF Llama checkpoint."""
    model = nnx.merge(graph, weights)

    def array(x: Any) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(jnp.asarray(x).astype(jnp.bfloat16)))

    out = {"model.embed_tokens.weight": array(model.embedding[...]), "model.norm.weight": array(model.norm[...])}
    for ours, theirs in HF_NAMES.items():
        stacked = np.asarray(getattr(model.layers, ours)[...])
        for i, w in enumerate(stacked):
            out[f"model.layers.{i}.{theirs}.weight"] = array(w.T)
    return out


def from_hf_tensors(tensors: dict[str, np.ndarray], config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The inverse of ``hf_tensors``, float32 weights."""
    graph, weights, _ = initial(0, config)
    model = nnx.merge(graph, weights)
    model.embedding[...] = jnp.asarray(tensors["model.embed_tokens.weight"], jnp.float32)
    model.norm[...] = jnp.asarray(tensors["model.norm.weight"], jnp.float32)
    for ours, theirs in HF_NAMES.items():
        rows = [
            np.asarray(tensors[f"model.layers.{i}.{theirs}.weight"], np.float32).T for i in range(config.num_layers)
        ]
        getattr(model.layers, ours)[...] = jnp.asarray(np.stack(rows))
    return nnx.split(model)


def save_checkpoint(folder: Path, graph: nnx.GraphDef, weights: nnx.State, config: ModelConfig = CONFIG) -> None:
    """model.safetensors (bfloat16), config.json and generation_config.json; written whole or not at all."""
    with whole_file(folder / "model.safetensors") as part:
        save_file(hf_tensors(graph, weights), part, metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_hf() | {"dtype": "bfloat16", "pad_token_id": 2}, 2)
    generation = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_ids[0], "do_sample": False}
    write_json(folder / "generation_config.json", generation, 2)

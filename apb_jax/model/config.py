"""ModelConfig: the dimensions of a Llama-family or Qwen2 decoder, to and from HF ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apb_jax.errors import UserError
from apb_jax.rope.base import Rope, rope_from_hf

FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with RMSNorm, grouped-query attention, RoPE and SwiGLU; no biases but those of q, k, v (Qwen2)."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float
    max_positions: int
    qkv_bias: bool = False
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"model family {self.family!r} is not supported; supported: {', '.join(FAMILIES)}")
        sizes = {
            name: getattr(self, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                "head_dim", "max_positions",
            )
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads; "
                "grouped-query attention needs one"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; RoPE needs an even one")

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def retaining_width(self) -> int:
        """Columns of concat(q, k, v): what a retaining head reads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, without retaining heads."""
        qkv = self.hidden_size * self.retaining_width + (self.retaining_width if self.qkv_bias else 0)
        attention = qkv + self.num_heads * self.head_dim * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, without retaining heads."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self.layer_parameters + embeddings + self.hidden_size

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read an HF ``config.json`` as a mapping; whatever the decoder does not implement is refused by name."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        refused = {
            "hidden_act": hf.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(hf.get("attention_bias")),
            "mlp_bias": bool(hf.get("mlp_bias")),
            # Qwen2 carries the field but switches it off; Mistral v0.1 uses it.
            "sliding_window": bool(hf.get("sliding_window"))
            and bool(hf.get("use_sliding_window", family == "mistral")),
        }
        for name, bad in refused.items():
            if bad:
                raise UserError(
                    f"config.json has {name}={hf[name]!r}, which this decoder does not implement"
                    + ("; Mistral v0.2 and later do without it" if name == "sliding_window" else "")
                )
        try:
            heads = int(hf["num_attention_heads"])
            eos = hf.get("eos_token_id")
            return cls(
                family=family,
                vocab_size=int(hf["vocab_size"]),
                hidden_size=int(hf["hidden_size"]),
                intermediate_size=int(hf["intermediate_size"]),
                num_layers=int(hf["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(hf.get("num_key_value_heads") or heads),
                head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
                rope=rope_from_hf(hf),
                rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                max_positions=int(hf.get("max_position_embeddings", 32768)),
                qkv_bias=family == "qwen2",
                tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
                bos_id=hf.get("bos_token_id"),
                eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),),
            )
        except KeyError as missing:
            raise UserError(f"config.json lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers loads; ``from_hf(to_hf())`` is the identity."""
        architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[self.family]
        out: dict[str, Any] = {
            "architectures": [f"{architecture}ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "rope_theta": self.rope.theta,
            "rope_parameters": self.rope.to_hf(),
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0],
        }
        if self.family == "qwen2":
            out["use_sliding_window"] = False
        if self.family == "mistral":
            out["sliding_window"] = None
        return out

"""Which HF tensor becomes which of our parameters: a strict table per family, and the check of a checkpoint against it.

A rule is one row: HF name, our path, the HF shape in letters, how the matrix is turned, the logical axes of our array.
HF stores matrices output-major ``[out, in]``, one tensor per layer; ours are input-major and stacked, ``[L, in, out]``.

Letters: V vocabulary, E hidden size, M feed-forward width, QD = H*D, KD = K*D, W = QD + 2 KD, F retaining width,
K KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig


class UnmappedTensor(UserError):
    """The checkpoint holds a tensor that no rule of the family knows."""


class UnexpectedTensor(UserError):
    """A rule knows the name, but a model of this configuration does not have the tensor."""


class DuplicatedTensor(UserError):
    """Two files of one checkpoint hold the same tensor."""


class MissingTensor(UserError):
    """A rule asks for a tensor that no file of the checkpoint holds."""


class WrongShape(UserError):
    """The tensor's shape differs from the one the configuration demands."""


class WrongDtype(UserError):
    """The tensor's dtype is not a floating-point type that weights come in."""


WEIGHT_DTYPES = ("BF16", "F16", "F32")

MESH_AXIS = {"heads": "tp", "kv_heads": "tp", "ffn": "tp", "vocab_columns": "tp"}
"""Logical axes that tensor parallelism splits; every other logical axis is replicated."""


@dataclass(frozen=True)
class Rule:
    """One row of a table. ``{layer}`` in ``hf`` marks a tensor per layer, stacked on our leading axis."""

    hf: str
    path: str
    shape: tuple[str, ...]
    axes: tuple[str, ...]
    transpose: bool = False
    columns: tuple[str, ...] = ()
    part: int = 0
    """``columns`` splits the last HF axis into named widths, of which this rule takes number ``part``."""

    def __str__(self) -> str:
        shape = f"[{', '.join(self.shape)}]"
        piece = f" columns {self.columns[self.part]} (part {self.part})" if self.columns else ""
        return f"{self.hf} {shape}{piece} -> {self.path}{' transposed' if self.transpose else ''}"

    @property
    def stacked(self) -> bool:
        """Whether there is one HF tensor per layer."""
        return "{layer}" in self.hf

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches every HF name of this rule; group ``layer`` is the layer index."""
        return re.compile(re.escape(self.hf).replace(re.escape("{layer}"), r"(?P<layer>\d+)"))

    def names(self, num_layers: int) -> tuple[str, ...]:
        """The HF names this rule reads, layer by layer."""
        if not self.stacked:
            return (self.hf,)
        return tuple(self.hf.format(layer=layer) for layer in range(num_layers))

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one HF tensor."""
        return tuple(sizes[letter] for letter in self.shape)

    def our_shape(self, sizes: Mapping[str, int], num_layers: int) -> tuple[int, ...]:
        """Shape of our array."""
        *rows, _ = self.hf_shape(sizes)
        columns = self.column_range(sizes)
        shape = (*rows, columns.stop - columns.start)
        shape = (*shape[:-2], shape[-1], shape[-2]) if self.transpose else shape
        return (num_layers, *shape) if self.stacked else shape

    def column_range(self, sizes: Mapping[str, int]) -> slice:
        """The last-axis range of the HF tensor that belongs to this rule."""
        if not self.columns:
            return slice(0, sizes[self.shape[-1]])
        start = sum(sizes[letter] for letter in self.columns[: self.part])
        return slice(start, start + sizes[self.columns[self.part]])


def _layer(name: str) -> str:
    return "model.layers.{layer}." + name


DECODER = (
    Rule("model.embed_tokens.weight", "embedding", ("V", "E"), ("vocab", "embed")),
    Rule(_layer("input_layernorm.weight"), "layers.attention_norm", ("E",), ("layer", "embed")),
    Rule(_layer("self_attn.q_proj.weight"), "layers.q", ("QD", "E"), ("layer", "embed", "heads"), True),
    Rule(_layer("self_attn.k_proj.weight"), "layers.k", ("KD", "E"), ("layer", "embed", "kv_heads"), True),
    Rule(_layer("self_attn.v_proj.weight"), "layers.v", ("KD", "E"), ("layer", "embed", "kv_heads"), True),
    Rule(_layer("self_attn.o_proj.weight"), "layers.o", ("E", "QD"), ("layer", "heads", "embed"), True),
    Rule(_layer("post_attention_layernorm.weight"), "layers.mlp_norm", ("E",), ("layer", "embed")),
    Rule(_layer("mlp.gate_proj.weight"), "layers.gate", ("M", "E"), ("layer", "embed", "ffn"), True),
    Rule(_layer("mlp.up_proj.weight"), "layers.up", ("M", "E"), ("layer", "embed", "ffn"), True),
    Rule(_layer("mlp.down_proj.weight"), "layers.down", ("E", "M"), ("layer", "ffn", "embed"), True),
    Rule("model.norm.weight", "norm", ("E",), ("embed",)),
    Rule("lm_head.weight", "head", ("V", "E"), ("embed", "vocab_columns"), True),
)

QKV_BIAS = (
    Rule(_layer("self_attn.q_proj.bias"), "layers.q_bias", ("QD",), ("layer", "heads")),
    Rule(_layer("self_attn.k_proj.bias"), "layers.k_bias", ("KD",), ("layer", "kv_heads")),
    Rule(_layer("self_attn.v_proj.bias"), "layers.v_bias", ("KD",), ("layer", "kv_heads")),
)

_FC1 = _layer("self_attn.fc1.weight")
_QKV = ("QD", "KD", "KD")
RETAINING_HEADS = (
    Rule(_FC1, "layers.fc1_q", ("F", "W"), ("layer", "heads", "retaining"), True, _QKV, 0),
    Rule(_FC1, "layers.fc1_k", ("F", "W"), ("layer", "kv_heads", "retaining"), True, _QKV, 1),
    Rule(_FC1, "layers.fc1_v", ("F", "W"), ("layer", "kv_heads", "retaining"), True, _QKV, 2),
    Rule(_layer("self_attn.fc2.weight"), "layers.fc2", ("K", "F"), ("layer", "retaining", "kv_heads"), True),
)

FAMILY_RULES: dict[str, tuple[Rule, ...]] = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER + QKV_BIAS,
}

RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers that old transformers releases saved; the configuration determines them, so they are not read."""

REASONS = (
    (re.compile(r"qkv_proj|query_key_value|W_pack|wqkv|c_attn"), "q, k and v are fused into one tensor"),
    (re.compile(r"gate_up_proj|w1w3"), "gate and up are fused into one tensor"),
    (
        re.compile(r"\.(qweight|qzeros|g_idx|scales|weight_scale|weight_packed|absmax|quant_map)\b|SCB"),
        "the checkpoint is quantised",
    ),
    (re.compile(r"lora_[AB]"), "this is a LoRA adapter; merge it into its base model first"),
    (re.compile(r"^(layers|tok_embeddings|output)\b"), "these are Meta's or Mistral's own names, not the HF ones"),
)
"""Why a tensor that no rule knows may be there: pattern, reason."""


class Tensor(Protocol):
    """A tensor lying in a file: what the header says, without its data."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> object: ...


T = TypeVar("T", bound=Tensor)


def sizes_of(config: ModelConfig, retaining_hidden: int | None) -> dict[str, int]:
    """The value of every letter of the tables."""
    return {
        "V": config.vocab_size,
        "E": config.hidden_size,
        "M": config.intermediate_size,
        "QD": config.num_heads * config.head_dim,
        "KD": config.num_kv_heads * config.head_dim,
        "W": config.retaining_width,
        "K": config.num_kv_heads,
        "F": retaining_hidden or 0,
    }


def rules_for(config: ModelConfig, retaining_hidden: int | None = None) -> tuple[Rule, ...]:
    """The rows that a model of this configuration needs, in our order."""
    rules = FAMILY_RULES[config.family] + (RETAINING_HEADS if retaining_hidden else ())
    return tuple(rule for rule in rules if not (config.tie_embeddings and rule.path == "head"))


def collect(tensors: Iterable[T]) -> dict[str, T]:
    """By name; the same name in two files is an error."""
    found: dict[str, T] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise DuplicatedTensor(
                f"tensor {tensor.name!r} is in two files, {found[tensor.name].file} and {tensor.file}; "
                "the rule is one file per tensor: remove one of them"
            )
        found[tensor.name] = tensor
    return found


def check(
    tensors: Mapping[str, Tensor],
    rules: Sequence[Rule],
    *,
    family: str,
    sizes: Mapping[str, int],
    num_layers: int,
) -> None:
    """Hold every tensor against every rule; raise the first of the errors above that applies, else return."""
    known = FAMILY_RULES[family] + RETAINING_HEADS
    wanted = {name: rule for rule in rules for name in rule.names(num_layers)}
    for name, tensor in tensors.items():
        if name not in wanted:
            _refuse(tensor, known, family, num_layers)
    for name, rule in wanted.items():
        if name not in tensors:
            hint = " (config.json may lack tie_word_embeddings)" if rule.path == "head" else ""
            raise MissingTensor(f"tensor {name!r} is in no file of the checkpoint{hint}; rule: {rule}")
        tensor, shape = tensors[name], rule.hf_shape(sizes)
        if tuple(tensor.shape) != shape:
            raise WrongShape(
                f"tensor {name!r} in {tensor.file} has shape {tuple(tensor.shape)}; config.json demands {shape}; "
                f"rule: {rule}"
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise WrongDtype(
                f"tensor {name!r} in {tensor.file} has dtype {tensor.dtype}; weights are one of "
                f"{', '.join(WEIGHT_DTYPES)}; rule: {rule}"
            )


def _refuse(tensor: Tensor, known: Sequence[Rule], family: str, num_layers: int) -> None:
    for rule in known:
        match = rule.pattern.fullmatch(tensor.name)
        if match is None:
            continue
        if rule.path == "head":
            why = "config.json ties the head to the embedding (tie_word_embeddings)"
        elif "layer" in match.groupdict():
            why = f"the model has layers 0 to {num_layers - 1}"
        else:
            why = "this configuration does not have it"
        raise UnexpectedTensor(f"tensor {tensor.name!r} in {tensor.file} is unexpected: {why}; rule: {rule}")
    reason = next((reason for pattern, reason in REASONS if pattern.search(tensor.name)), None)
    raise UnmappedTensor(
        f"tensor {tensor.name!r} in {tensor.file} has no rule in the table of family {family!r}"
        + (f": {reason}" if reason else "")
    )

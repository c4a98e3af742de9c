"""ModelConfig: the dimensions of a decoder and what each of its layers is, to and from HF ``config.json``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from apb_jax.errors import UserError
from apb_jax.model.families import FAMILIES, MAX_WINDOW_LAYERS, NO_ROPE_INTERVAL, SLIDING_WINDOW, Family
from apb_jax.model.hf_keys import check_keys, real, switch, token_ids, whole
from apb_jax.model.weights import count, weights_of
from apb_jax.rope.base import Rope
from apb_jax.rope.default import DefaultRope, NoRope
from apb_jax.rope.from_hf import rope_from_hf
from apb_jax.rope.string import StringRope
from apb_jax.rope.yarn import YarnRope
from apb_jax.typed import check_items, check_types, check_value

LARGEST_EPS = 0.1
"""Far above any model's: a larger one is a damaged file."""


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer: static, known while a layer is traced."""

    qk_norm: bool = False
    """RMSNorm over the head dimension of q and k, before RoPE (Qwen3). Equal in all layers: its weights are stacked."""
    window: int | None = None
    """Tokens that a row attends to, itself among them; None: all. Computed as full attention: positions end there."""
    rope: Rope | None = None
    """The layer's own rule, ``NoRope()`` for none; None: the model's."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.window is not None and self.window < 1:
            raise UserError(f"sliding window is {self.window} tokens; it must be at least 1 (None: full attention)")


@dataclass(frozen=True)
class Run:
    """``count`` layers in a row from layer ``start`` on that are alike."""

    spec: LayerSpec
    start: int
    count: int


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
    layers: tuple[LayerSpec, ...] = (LayerSpec(),)
    """A spec per layer, or the group of them that repeats until there are ``num_layers``."""

    def __post_init__(self) -> None:
        check_types(self)
        check_items("layers", self.layers, LayerSpec)
        check_items("eos_ids", self.eos_ids, int)
        if self.family not in FAMILIES:
            raise UserError(f"model family {self.family!r} is not supported; supported: {', '.join(FAMILIES)}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise UserError(f"{name} is {value}; it must be a whole number of at least 1, below 2**31")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads; "
                "grouped-query attention needs one"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; RoPE needs an even one")
        if not 0 < self.rms_norm_eps <= LARGEST_EPS:
            raise UserError(
                f"rms_norm_eps is {self.rms_norm_eps}; it must lie above 0 and up to {LARGEST_EPS} (Llama 3: 1e-05)"
            )
        self._check_layers()

    def _check_layers(self) -> None:
        if not 1 <= len(self.layers) <= self.num_layers:
            raise UserError(f"{len(self.layers)} layer specs for {self.num_layers} layers; give 1 to {self.num_layers}")
        family = FAMILIES[self.family]
        if any(spec.qk_norm != family.qk_norm for spec in self.layers):
            raise UserError(
                f"every layer of family {self.family!r} has qk_norm={family.qk_norm}: "
                f"give layers=(LayerSpec(qk_norm={family.qk_norm}),)"
            )
        if self.window is not None and self.max_positions > self.window:
            raise UserError(
                f"max_positions is {self.max_positions}; {self.window_note} (nearest legal choice: {self.window})"
            )

    def spec(self, layer: int) -> LayerSpec:
        """What layer ``layer`` is."""
        return self.layers[layer % len(self.layers)]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All layers as stretches of equal ones: a stretch is one scan."""
        groups = itertools.groupby(range(self.num_layers), self.spec)
        stretches = [(spec, list(layers)) for spec, layers in groups]
        return tuple(Run(spec, layers[0], len(layers)) for spec, layers in stretches)

    @property
    def window(self) -> int | None:
        """The smallest sliding window of any layer; None: all attend to everything."""
        return min((spec.window for spec in self.layers if spec.window is not None), default=None)

    @property
    def window_note(self) -> str | None:
        """Why positions end before the model's own do; None where they do not."""
        if self.window is None:
            return None
        return (
            f"layers attend over a sliding window of {self.window} tokens, which is computed as full attention: "
            "it is the same up to that many positions, and they end there"
        )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def retaining_width(self) -> int:
        """Columns of concat(q, k, v): what a retaining head reads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def facts(self) -> frozenset[str]:
        """What decides which rows of the table of weights the model has."""
        facts = {"untied": not self.tie_embeddings, "qkv_bias": self.qkv_bias, "qk_norm": self.layers[0].qk_norm}
        return frozenset(name for name, holds in facts.items() if holds)

    def sizes(self, retaining_hidden: int | None = None) -> dict[str, int]:
        """The value of every letter of the table of weights."""
        return {
            "V": self.vocab_size,
            "E": self.hidden_size,
            "M": self.intermediate_size,
            "D": self.head_dim,
            "QD": self.num_heads * self.head_dim,
            "KD": self.num_kv_heads * self.head_dim,
            "W": self.retaining_width,
            "K": self.num_kv_heads,
            "F": retaining_hidden or 0,
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, without retaining heads."""
        return count(tuple(weight for weight in weights_of(self.facts) if weight.stacked), self.sizes())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, without retaining heads."""
        once = count(tuple(weight for weight in weights_of(self.facts) if not weight.stacked), self.sizes())
        return self.num_layers * self.layer_parameters + once

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read an HF ``config.json`` as a mapping, with transformers' defaults for what is absent or null.

        Raises:
            UserError: a key that is not computed or not known, or a value out of range; by name, in one line.
        """
        name = hf.get("model_type")
        if name not in FAMILIES:
            raise UserError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        check_keys(hf)
        hidden, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
        if heads < 1:
            raise UserError(f"config.json has num_attention_heads={heads}; it must be at least 1")
        head_dim = whole(hf, "head_dim", family.head_dim if "head_dim" not in hf and family.head_dim else 0)
        if not head_dim and hidden % heads:
            raise UserError(f"config.json has hidden_size={hidden}, no multiple of {heads} heads, and no head_dim")
        rope = rope_from_hf(hf, family.max_positions, family.theta)
        layers = _layers_from_hf(hf, family)
        positions = rope.positions(whole(hf, "max_position_embeddings", family.max_positions))
        windows = [spec.window for spec in layers if spec.window is not None]
        bos = token_ids(hf, "bos_token_id")
        if len(bos) > 1:
            raise UserError(f"config.json has bos_token_id={list(bos)}; it must be one token id")
        return cls(
            family=name,
            vocab_size=whole(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole(hf, "intermediate_size"),
            num_layers=whole(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=whole(
                hf, "num_key_value_heads", heads if "num_key_value_heads" in hf else family.kv_heads or heads
            ),
            head_dim=head_dim or hidden // heads,
            rope=rope,
            rms_norm_eps=real(hf, "rms_norm_eps", 1e-6),
            max_positions=min([positions, *windows]),
            qkv_bias=family.qkv_bias,
            tie_embeddings=switch(hf, "tie_word_embeddings", family.tie_embeddings),
            bos_id=bos[0] if bos else None,
            eos_ids=token_ids(hf, "eos_token_id"),
            layers=layers[:1] if len(set(layers)) == 1 else layers,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that transformers loads; ``from_hf(to_hf())`` is the identity.

        Raises:
            UserError: layers differ in a way that no ``config.json`` of the family can say.
        """
        family = FAMILIES[self.family]
        out: dict[str, Any] = {
            "architectures": [f"{family.architecture}ForCausalLM"],
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
        specs = [self.spec(layer) for layer in range(self.num_layers)]
        if family.sliding == "all":
            out["sliding_window"] = self.window
        if family.sliding == "upper":
            out["use_sliding_window"] = self.window is not None
            if self.window is not None:
                first = next(layer for layer, spec in enumerate(specs) if spec.window)
                out |= {"sliding_window": self.window, "max_window_layers": first}
        if family.some_without_rope:
            out["no_rope_layers"] = [int(spec.rope is None) for spec in specs]
        if list(_layers_from_hf(out, family)) != specs:
            raise UserError(f"the layers of this model differ in a way that no config.json of {self.family!r} can say")
        if family.some_without_rope:
            out["pad_token_id"] = None  # absent, transformers takes an id that few vocabularies have
        return out


def _layers_from_hf(hf: Mapping[str, Any], family: Family) -> tuple[LayerSpec, ...]:
    """The spec of every layer."""
    layers = whole(hf, "num_hidden_layers")
    if family.sliding is None:
        if hf.get("sliding_window") is not None or switch(hf, "use_sliding_window"):
            raise UserError(
                f"config.json has sliding_window={hf.get('sliding_window')!r}, which a {hf['model_type']} has not; "
                "supported: null"
            )
        first, window = layers, None
    else:
        # A config that does not mention the window means transformers' default; null means none.
        window = whole(hf, "sliding_window", 0 if "sliding_window" in hf else SLIDING_WINDOW) or None
        first = 0 if family.sliding == "all" else whole(hf, "max_window_layers", MAX_WINDOW_LAYERS)
        if family.sliding == "upper" and not switch(hf, "use_sliding_window"):
            first, window = layers, None
    rotated = _rotated_layers(hf, family, layers)
    specs = tuple(
        LayerSpec(family.qk_norm, window if layer >= first else None, None if rotated[layer] else NoRope())
        for layer in range(layers)
    )
    types = ["full_attention" if spec.window is None else "sliding_attention" for spec in specs]
    given = hf.get("layer_types")
    if given is not None and given != types:
        kinds = sorted(set(map(str, given))) if isinstance(given, list | tuple) else given
        raise UserError(
            f"config.json has layer_types of {kinds}, which is not computed; supported: one entry a layer, "
            "'full_attention', or 'sliding_attention' where sliding_window and max_window_layers say the same"
        )
    return specs


def _rotated_layers(hf: Mapping[str, Any], family: Family, layers: int) -> list[bool]:
    """Which layers have RoPE: all, but in families where some have no positions (NoPE)."""
    given = hf.get("no_rope_layers")
    if not family.some_without_rope:
        if given is not None or hf.get("no_rope_layer_interval") is not None:
            raise UserError(f"config.json has no_rope_layers={given!r}, which a {hf['model_type']} has not; delete it")
        return [True] * layers
    if given is None:
        interval = whole(hf, "no_rope_layer_interval", NO_ROPE_INTERVAL)
        if interval < 1:
            raise UserError(f"config.json has no_rope_layer_interval={interval}; it must be at least 1 (SmolLM3: 4)")
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(given, list | tuple) or len(given) != layers or any(flag not in (0, 1) for flag in given):
        raise UserError(
            f"config.json has no_rope_layers={given!r}; it must be {layers} numbers, 1 for a layer with RoPE, else 0"
        )
    return [bool(flag) for flag in given]


def with_yarn(config: ModelConfig, factor: float) -> ModelConfig:
    """``config`` stretched by YaRN, as HF's ``{"type": "yarn", "factor": factor}`` over its positions says.

    Raises:
        UserError: a factor below 1; a model whose rope is stretched already, or differs by layer.
    """
    own = [spec.rope for spec in config.layers if spec.rope is not None and not isinstance(spec.rope, NoRope)]
    if type(config.rope) is not DefaultRope or own:
        raise UserError(
            f"--rope yarn:{factor:g} stretches a model of plain RoPE; this one has {config.rope.kind!r} up to "
            f"{config.max_positions} positions; drop --rope"
        )
    rope = YarnRope(config.rope.theta, factor, config.max_positions)
    positions = rope.positions(config.max_positions)
    return replace(config, rope=rope, max_positions=min(positions, config.window or positions))


def with_string(config: ModelConfig, offset: float = 0.33, local: int = 128, length: int | None = None) -> ModelConfig:
    """``config`` under STRING. ``offset``: tokens, or below 1 a share of ``length`` (default: all positions)."""
    check_value("--string-offset", offset, float)
    if not 0 < offset < math.inf:
        raise UserError(f"--string-offset is {offset}; it must be a share between 0 and 1, or tokens (the paper: 0.33)")
    tokens = int(offset * (length or config.max_positions)) if offset < 1 else int(offset)

    def shifted(rope: Rope) -> Rope:
        return StringRope(rope.theta, base=rope, offset=tokens, local=local)

    layers = tuple(
        replace(spec, rope=shifted(spec.rope)) if spec.rope and not isinstance(spec.rope, NoRope) else spec
        for spec in config.layers
    )
    return replace(config, rope=shifted(config.rope), layers=layers)

"""The one table of weights: what every parameter is called, its shape, its split over the mesh, its HF name.

Random initialisation, partition specs, conversion in both directions, counting and slicing all read it. A leaf: it
knows configurations only by the facts that a row needs.

Letters: V vocabulary, E hidden size, M feed-forward width, D head dimension, K KV heads, QD = H*D, KD = K*D,
W = QD + 2 KD, F width of the retaining heads. Ours are input-major; a layer's weight has a layer axis in front.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.float8 import FP8

Kind = Literal["embedding", "head", "norm", "matrix", "bias", "scorer", "fp8", "scale"]
"""matrix: a projection of every decoder, [in, out]; scorer: a matrix of the retaining heads.

fp8: a matrix in e4m3, output-major as tensor cores and HF have it, [out, in]; scale: float32, one for each output.
"""

EMBEDDING_SCALE = 0.02
FP8_WEIGHTS = "fp8"
"""The fact of a model whose matrices are quantised."""
LAYERS = "layers."
QKV_COLUMNS = ("QD", "KD", "KD")


@dataclass(frozen=True)
class Weight:
    """One row: a parameter of a model that has all the facts in ``needs``."""

    path: str
    letters: tuple[str, ...]
    """Shape without the layer axis."""
    kind: Kind
    split: str | None = None
    """The letter whose axis tensor parallelism splits; None: replicated."""
    hf: str | None = None
    """HF name, "{layer}" for the layer's number; None: made here, in no HF file."""
    needs: frozenset[str] = frozenset()
    """Facts: "untied", "qkv_bias", "qk_norm" of the configuration; "heads", "folded", "unfolded" of retaining heads."""
    columns: tuple[str, ...] = ()
    part: int = 0
    """``columns``: widths that share the HF tensor's last axis, of which this weight is number ``part``."""

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in self.letters:
            raise ValueError(f"{self.path} has no axis {self.split!r} to split; its axes: {self.letters}")

    @property
    def name(self) -> str:
        """The attribute of its module."""
        return self.path.removeprefix(LAYERS)

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return self.path.startswith(LAYERS)

    @property
    def transposed(self) -> bool:
        """Whether HF stores it the other way round, output-major."""
        return self.kind in ("matrix", "scorer", "head")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of one layer's weight."""
        return tuple(sizes[letter] for letter in self.letters)

    def spec(self, tp_axis: str) -> PartitionSpec:
        """Its partition with the layer axis, the split one over ``tp_axis``."""
        if self.split is None:
            return PartitionSpec()
        axes = [tp_axis if letter == self.split else None for letter in self.letters]
        return PartitionSpec(*[None] * self.stacked, *axes)

    def quantised(self) -> tuple[Weight, Weight]:
        """The two rows that take this matrix's place in a model with ``FP8_WEIGHTS``; FP8 checkpoints have them."""
        inputs, outputs = self.letters
        scale_split = self.split if self.split == outputs else None
        return (
            Weight(f"{self.path}_fp8", (outputs, inputs), "fp8", self.split, self.hf, self.needs),
            Weight(f"{self.path}_scale", (outputs,), "scale", scale_split, f"{self.hf}_scale", self.needs),
        )

    def dtype(self, model: Any) -> Any:
        """The type it is held in, where the model's is ``model``."""
        return {"fp8": FP8, "scale": jnp.dtype(jnp.float32)}.get(self.kind, jnp.dtype(model))

    def itemsize(self, model: int) -> int:
        """Bytes of a value, where one of the model's own dtype has ``model``."""
        return {"fp8": 1, "scale": 4}.get(self.kind, model)

    def initial(self, shape: tuple[int, ...], key: Callable[[], Array], dtype: Any) -> Array:
        """Random values: norms 1, biases 0, matrices of variance 1 / inputs, embedding and head of deviation 0.02."""
        if self.kind == "norm":
            return jnp.ones(shape, dtype)
        if self.kind == "bias":
            return jnp.zeros(shape, dtype)
        scale = EMBEDDING_SCALE if self.kind in ("embedding", "head") else shape[-2] ** -0.5
        return jax.random.normal(key(), shape, dtype) * jnp.asarray(scale, dtype)


def _hf(name: str) -> str:
    return "model.layers.{layer}." + name


_BIAS, _QK_NORM = frozenset({"qkv_bias"}), frozenset({"qk_norm"})
_HEADS, _UNFOLDED, _FOLDED = frozenset({"heads"}), frozenset({"unfolded"}), frozenset({"folded"})
_FC1 = _hf("self_attn.fc1.weight")

WEIGHTS = (
    Weight("embedding", ("V", "E"), "embedding", None, "model.embed_tokens.weight"),
    Weight("layers.attention_norm", ("E",), "norm", None, _hf("input_layernorm.weight")),
    Weight("layers.q", ("E", "QD"), "matrix", "QD", _hf("self_attn.q_proj.weight")),
    Weight("layers.k", ("E", "KD"), "matrix", "KD", _hf("self_attn.k_proj.weight")),
    Weight("layers.v", ("E", "KD"), "matrix", "KD", _hf("self_attn.v_proj.weight")),
    Weight("layers.o", ("QD", "E"), "matrix", "QD", _hf("self_attn.o_proj.weight")),
    Weight("layers.mlp_norm", ("E",), "norm", None, _hf("post_attention_layernorm.weight")),
    Weight("layers.gate", ("E", "M"), "matrix", "M", _hf("mlp.gate_proj.weight")),
    Weight("layers.up", ("E", "M"), "matrix", "M", _hf("mlp.up_proj.weight")),
    Weight("layers.down", ("M", "E"), "matrix", "M", _hf("mlp.down_proj.weight")),
    Weight("norm", ("E",), "norm", None, "model.norm.weight"),
    Weight("head", ("E", "V"), "head", "V", "lm_head.weight", frozenset({"untied"})),
    Weight("layers.q_bias", ("QD",), "bias", "QD", _hf("self_attn.q_proj.bias"), _BIAS),
    Weight("layers.k_bias", ("KD",), "bias", "KD", _hf("self_attn.k_proj.bias"), _BIAS),
    Weight("layers.v_bias", ("KD",), "bias", "KD", _hf("self_attn.v_proj.bias"), _BIAS),
    Weight("layers.q_norm", ("D",), "norm", None, _hf("self_attn.q_norm.weight"), _QK_NORM),
    Weight("layers.k_norm", ("D",), "norm", None, _hf("self_attn.k_norm.weight"), _QK_NORM),
    Weight("layers.fc1_q", ("QD", "F"), "scorer", "QD", _FC1, _UNFOLDED, QKV_COLUMNS, 0),
    Weight("layers.fc1_k", ("KD", "F"), "scorer", "KD", _FC1, _UNFOLDED, QKV_COLUMNS, 1),
    Weight("layers.fc1_v", ("KD", "F"), "scorer", "KD", _FC1, _UNFOLDED, QKV_COLUMNS, 2),
    Weight("layers.fc1_folded", ("E", "F"), "scorer", None, None, _FOLDED),
    Weight("layers.fc1_bias", ("F",), "bias", None, None, _FOLDED | _BIAS),
    Weight("layers.fc2", ("F", "K"), "scorer", "K", _hf("self_attn.fc2.weight"), _HEADS),
)
"""In the order of initialisation; the embedding comes before all layers, norm and head behind them."""

QUANTISED = {weight.path: weight.quantised() for weight in WEIGHTS if weight.kind == "matrix"}
"""Path of a matrix -> its rows in 8 bits: values, scale."""
BY_PATH = {weight.path: weight for weight in (*WEIGHTS, *itertools.chain(*QUANTISED.values()))}
MATRICES = frozenset(weight.name for weight in BY_PATH.values() if weight.kind in ("matrix", "fp8"))
"""Names of the layers' projections: what a decoding step reads most of, and may be read in slices or in place."""


def weights_of(facts: frozenset[str]) -> tuple[Weight, ...]:
    """The rows that a model with these facts has."""
    rows = (weight for weight in WEIGHTS if weight.needs <= facts)
    if FP8_WEIGHTS not in facts:
        return tuple(rows)
    return tuple(part for weight in rows for part in QUANTISED.get(weight.path, (weight,)))


def head_facts(retaining_hidden: int | None, folded: bool = False) -> frozenset[str]:
    """The facts that retaining heads of this width add; None: no heads."""
    if not retaining_hidden:
        return frozenset()
    return frozenset({"heads", "folded" if folded else "unfolded"})


def weight_facts(fp8: bool) -> frozenset[str]:
    """The facts that the precision of the matrices adds."""
    return frozenset({FP8_WEIGHTS} if fp8 else ())


def count(weights: tuple[Weight, ...], sizes: Mapping[str, int]) -> int:
    """Parameters in these rows, one layer each."""
    return sum(math.prod(weight.shape(sizes)) for weight in weights)


def partition_specs(state: Any, tp_axis: str = "tp") -> Any:
    """Megatron-style specs for a Transformer's state: heads and FFN columns over ``tp_axis``, the rest replicated."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        return BY_PATH[".".join(name for name in names if name != "value")].spec(tp_axis)

    return jax.tree_util.tree_map_with_path(spec, state)

"""Which HF tensor becomes which of our parameters, and the check of a checkpoint against that.

A rule is a row of the table of weights (``model/weights.py``, which names the letters) seen from the HF side: HF stores
matrices output-major ``[out, in]``, one tensor per layer; ours are input-major and stacked, ``[L, in, out]``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.model.weights import BY_PATH, WEIGHTS, Weight, head_facts, weight_facts, weights_of


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
FP8_DTYPES = ("F8_E4M3",)


@dataclass(frozen=True)
class Rule:
    """How one weight lies in HF files. ``{layer}`` in ``hf`` marks a tensor per layer, stacked on our leading axis."""

    hf: str
    path: str
    shape: tuple[str, ...]
    """In HF's order, letters of the table."""
    transpose: bool = False
    columns: tuple[str, ...] = ()
    part: int = 0
    """``columns`` splits the last HF axis into named widths, of which this rule takes number ``part``."""

    @classmethod
    def of(cls, weight: Weight) -> Rule:
        """The rule of a row that HF files hold."""
        assert weight.hf is not None
        shape = weight.letters[::-1] if weight.transposed else weight.letters
        shape = (*shape[:-1], "W") if weight.columns else shape
        return cls(weight.hf, weight.path, shape, weight.transposed, weight.columns, weight.part)

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

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In which its tensors may come."""
        return FP8_DTYPES if BY_PATH[self.path].kind == "fp8" else WEIGHT_DTYPES

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


RULES = tuple(Rule.of(weight) for weight in WEIGHTS if weight.hf)
"""Of every weight of every family."""
RETAINING_HEADS = tuple(
    Rule.of(weight) for weight in WEIGHTS if weight.hf and weight.needs & head_facts(retaining_hidden=1)
)

RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers that old transformers releases saved; the configuration determines them, so they are not read."""

REASONS = (
    (re.compile(r"qkv_proj|query_key_value|W_pack|wqkv|c_attn"), "q, k and v are fused into one tensor"),
    (re.compile(r"gate_up_proj|w1w3"), "gate and up are fused into one tensor"),
    (
        re.compile(r"\.(qweight|qzeros|g_idx|scales|weight_scale|weight_packed|absmax|quant_map)\b|SCB"),
        "the checkpoint is quantised",
    ),
    (
        re.compile(r"\.(input_scale|[kv]_scale|output_scale)$"),
        "static activation scales are not computed with: take an FP8-dynamic checkpoint",
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
    """The value of every letter of the table."""
    return config.sizes(retaining_hidden)


def rules_for(config: ModelConfig, retaining_hidden: int | None = None, *, fp8: bool = False) -> tuple[Rule, ...]:
    """The rules that a model of this configuration needs, in the table's order; heads unfolded, as files hold them.

    ``fp8``: of a checkpoint whose matrices are e4m3 with scales.
    """
    facts = config.facts | head_facts(retaining_hidden) | weight_facts(fp8)
    return tuple(Rule.of(weight) for weight in weights_of(facts) if weight.hf)


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
    wanted = {name: rule for rule in rules for name in rule.names(num_layers)}
    for name, tensor in tensors.items():
        if name not in wanted:
            _refuse(tensor, wanted.values(), family, num_layers)
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
        if tensor.dtype not in rule.dtypes:
            left = "; a checkpoint that leaves layers unquantised is not computed" if rule.dtypes == FP8_DTYPES else ""
            raise WrongDtype(
                f"tensor {name!r} in {tensor.file} has dtype {tensor.dtype}; weights are one of "
                f"{', '.join(rule.dtypes)}{left}; rule: {rule}"
            )


def _refuse(tensor: Tensor, wanted: Collection[Rule], family: str, num_layers: int) -> None:
    for rule in RULES:
        match = rule.pattern.fullmatch(tensor.name)
        if match is None:
            continue
        if rule.path == "head":
            why = "config.json ties the head to the embedding (tie_word_embeddings)"
        elif rule in wanted:
            why = f"the model has layers 0 to {num_layers - 1}"
        else:
            why = f"a {family!r} of this configuration does not have it"
        raise UnexpectedTensor(f"tensor {tensor.name!r} in {tensor.file} is unexpected: {why}; rule: {rule}")
    reason = next((reason for pattern, reason in REASONS if pattern.search(tensor.name)), None)
    raise UnmappedTensor(
        f"tensor {tensor.name!r} in {tensor.file} has no rule in the table of weights (family {family!r})"
        + (f": {reason}" if reason else "")
    )

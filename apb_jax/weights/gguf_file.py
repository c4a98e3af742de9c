"""A GGUF model under HF names: the mapping table, its checks and the streaming work on it as on an HF folder.

Quantised tensors are dequantised by the ``gguf`` package while they are read, a few rows at a time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.weights.gguf_config import DIVISORS, model_config
from apb_jax.weights.gguf_header import GGUFHeader, GGUFTensor, gguf_package, read_gguf_header
from apb_jax.weights.safetensors_header import DTYPES, TensorEntry

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
LAYER = re.compile(r"blk\.(\d+)\.(.+)")
HALF_ROTATED = {"attn_q.weight": "num_heads", "attn_k.weight": "num_kv_heads"}
"""Whose rows the architecture llama stores in pairs (2j, 2j+1) for its rotation; HF's halves are (j, j + D/2)."""
CHUNK_BYTES = 32 * 2**20
"""Float32 bytes dequantised at a time by each reading thread."""


@dataclass(frozen=True)
class GGUFEntry(TensorEntry):
    """A tensor under its HF name; dtype, shape and ``nbytes`` are those that ``read_into`` delivers."""

    stored: GGUFTensor
    heads: int = 0
    """Heads whose rows are turned from pairs into halves; 0: the rows stay."""

    def read_into(self, target: np.ndarray) -> None:
        """Fill ``target`` (same shape and dtype, contiguous) from the file, in HF's order of rows."""
        dequantize, kind = gguf_package().dequantize, self.stored.kind
        rows = target.reshape(-1, self.shape[-1])
        order = halves_of_pairs(len(rows), self.heads) if self.heads else None
        row_bytes = self.stored.nbytes // max(1, len(rows))
        step = max(1, CHUNK_BYTES // (4 * self.shape[-1]))
        native = kind.name in DTYPES
        with self.file.open("rb") as file:
            file.seek(self.stored.offset)
            for start in range(0, len(rows), step):
                count = min(step, len(rows) - start)
                raw = file.read(count * row_bytes)
                if len(raw) < count * row_bytes:
                    raise UserError(f"{self.file} ends inside tensor {self.stored.name!r}; it is truncated")
                stored = np.frombuffer(raw, np.uint8).reshape(count, row_bytes)
                block = stored.view(target.dtype) if native else dequantize(stored, kind)
                if order is None:
                    rows[start : start + count] = block
                else:
                    rows[order[start : start + count]] = block


def halves_of_pairs(rows: int, heads: int) -> np.ndarray:
    """Where each row of a matrix in pairs goes: row 2j + p of a head to row j + p D/2; int [rows]."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def read_gguf(file: Path) -> tuple[dict[str, TensorEntry], ModelConfig, dict[str, Any]]:
    """(tensors by HF name, configuration, the ``config.json`` it stands for), from the header alone.

    Raises:
        UserError: a damaged header; settings or tensors that are not computed, each by name.
    """
    header = read_gguf_header(file)
    config, hf = model_config(header, _divisors(header))
    entries: dict[str, TensorEntry] = {}
    for tensor in header.tensors.values():
        if tensor.name == DIVISORS:
            continue
        if not _readable(tensor.kind):
            raise UserError(
                f"{file}: tensor {tensor.name!r} is of kind {tensor.kind.name}, which the gguf package does not "
                "dequantise; Q8_0, Q4_K and most others it does"
            )
        entry = _entry(header, tensor, config)
        entries[entry.name] = entry
    return entries, config, hf


@cache
def _readable(kind: GGMLQuantizationType) -> bool:
    """Whether the package has a rule for a kind: it is asked for one block of zeros."""
    gguf = gguf_package()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _entry(header: GGUFHeader, tensor: GGUFTensor, config: ModelConfig) -> GGUFEntry:
    match = LAYER.fullmatch(tensor.name)
    inner = LAYER_NAMES.get(match[2]) if match else None
    name = f"model.layers.{match[1]}.{inner}" if match and inner else NAMES.get(tensor.name)
    if name is None:
        raise UserError(
            f"{header.file}: tensor {tensor.name!r} ({tensor.kind.name}, shape {tensor.shape}) is nothing that this "
            f"decoder computes for general.architecture={header.settings['general.architecture']!r}"
        )
    heads = 0
    if match and match[2] in HALF_ROTATED and header.settings["general.architecture"] == "llama":
        heads = getattr(config, HALF_ROTATED[match[2]])
        if len(tensor.shape) != 2 or tensor.shape[0] != heads * config.head_dim:
            raise UserError(
                f"{header.file}: tensor {tensor.name!r} has shape {tensor.shape}; {heads} heads of "
                f"{config.head_dim} dimensions need {heads * config.head_dim} rows"
            )
    dtype = tensor.kind.name if tensor.kind.name in DTYPES else "F32"
    nbytes = math.prod(tensor.shape) * DTYPES[dtype].itemsize
    return GGUFEntry(name, header.file, dtype, tensor.shape, tensor.offset, nbytes, tensor, heads)


def _divisors(header: GGUFHeader) -> np.ndarray | None:
    tensor = header.tensors.get(DIVISORS)
    if tensor is None:
        return None
    if tensor.kind.name != "F32" or len(tensor.shape) != 1 or not tensor.nbytes:
        raise UserError(f"{header.file}: {DIVISORS} is {tensor.kind.name} {tensor.shape}; it must be a row of F32")
    out = np.empty(tensor.shape, np.float32)
    GGUFEntry(tensor.name, header.file, "F32", tensor.shape, tensor.offset, tensor.nbytes, tensor).read_into(out)
    return out

"""What is this path? Family, parameters, dtypes, heads, and what it takes per device; from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.presets import MODELS
from apb_jax.weights.checkpoint import HFFolder, LoadedModel, load
from apb_jax.weights.gguf_file import GGUFEntry
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.locate import locate
from apb_jax.weights.manifest import hash_files, read_manifest, verify
from apb_jax.weights.retaining_heads import HEAD_NAME, TORCH_SUFFIXES, read_heads
from apb_jax.weights.safetensors_header import TensorEntry

GIB = 2**30
ACTIVATION_WIDTHS = 6
"""Live activations per local token, in multiples of max(FFN width / tp, hidden size): an allowance, not measured."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes per device for a document of ``tokens`` on ``sp`` x ``tp`` devices."""

    weights: int
    cache_per_token: float
    activations_per_token: float

    @classmethod
    def of(cls, model: LoadedModel, sp: int, tp: int) -> DeviceMemory:
        config, itemsize = model.config, model.dtype.itemsize
        model.check_tp(tp)
        split = replicated = 0
        specs = model.specs()
        for path, shape in model.shapes().items():
            size = shape.size * shape.dtype.itemsize
            if "tp" in tuple(specs[path]):
                split += size
            else:
                replicated += size
        width = max(config.intermediate_size // tp, config.hidden_size)
        return cls(
            weights=replicated + split // tp,
            cache_per_token=config.kv_bytes_per_token(itemsize) / (sp * tp),
            activations_per_token=ACTIVATION_WIDTHS * width * itemsize / sp,
        )

    def total(self, tokens: int) -> int:
        """Weights, KV cache and the allowance for activations."""
        return int(self.weights + tokens * (self.cache_per_token + self.activations_per_token))

    def longest(self, memory: int) -> int:
        """Tokens of the longest document that ``memory`` bytes per device hold."""
        return max(0, int((memory - self.weights) / (self.cache_per_token + self.activations_per_token)))


def size_text(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def inspect(
    path: str,
    *,
    sp: int,
    tp: int,
    tokens: int,
    memory: int,
    heads: str | None = None,
    dtype: str = "bf16",
    check_hashes: bool = False,
) -> list[tuple[str, str]]:
    """Rows (what, value) that describe a model folder, a converted folder, a preset, a hub id or a file of heads."""
    for name, value in (("sp", sp), ("tp", tp), ("seq", tokens)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if Path(path).is_file() and not is_gguf(Path(path)):
        return _inspect_heads(Path(path))
    here = locate(path, weights_needed=path not in MODELS).folder is not None
    model = load(path, weights=None if here else "random", heads=heads, dtype=dtype)
    rows = [("name", model.name), *_describe(model.config)]
    manifest = read_manifest(model.folder) if model.folder else None
    if isinstance(model.source, HFFolder):
        stored = [_stored(entry) for entry in model.source.entries.values()]
        counts = Counter(dtype for dtype, _ in stored)
        nbytes = sum(size for _, size in stored)
        what = "GGUF" if model.folder is not None and is_gguf(model.folder) else "HF folder"
        rows += [
            ("format", f"{what}, {len(model.source.files)} file(s), {size_text(nbytes)}"),
            ("dtypes", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in sorted(counts.items()))),
        ]
    elif manifest is not None:
        nbytes = sum(record.bytes for record in manifest.files.values())
        origin = manifest.source + (f" at {manifest.revision[:12]}" if manifest.revision else "")
        rows += [
            ("format", f"converted folder (orbax), {size_text(nbytes)}, from {origin}"),
            ("dtypes", manifest.dtype),
            ("written by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ]
    else:
        rows.append(("format", "preset; its weights are not on this machine"))
    folded = ", folded" if model.fold_heads else ""
    rows.append(("retaining heads", f"width {model.retaining_hidden}{folded}" if model.retaining_hidden else "none"))
    rows.append(("tokenizer", type(model.tokenizer).__name__ if model.tokenizer is not None else "none"))
    need = DeviceMemory.of(model, sp, tp)
    rows += [
        (
            f"per device, sp={sp} tp={tp}, {tokens} tokens, {model.dtype}",
            f"{need.total(tokens) / GIB:.2f} GiB (weights {need.weights / GIB:.2f}, "
            f"KV cache {need.cache_per_token * tokens / GIB:.2f}, "
            f"activations about {need.activations_per_token * tokens / GIB:.2f})",
        ),
        (
            f"longest document in {memory / GIB:g} GiB per device",
            f"about {need.longest(memory):,} tokens (the model's positions end at {model.config.max_positions:,})",
        ),
    ]
    if check_hashes:
        rows.append(("SHA-256", _verify(model)))
    return rows


def _stored(entry: TensorEntry) -> tuple[str, int]:
    """(dtype or quantisation, bytes) as a tensor lies in its file."""
    return (
        (entry.stored.kind.name, entry.stored.nbytes) if isinstance(entry, GGUFEntry) else (entry.dtype, entry.nbytes)
    )


def _verify(model: LoadedModel) -> str:
    manifest = read_manifest(model.folder) if model.folder else None
    if manifest is None or model.folder is None:
        raise UserError(f"{model.folder} has no manifest, so there are no checksums to verify")
    expected = {model.folder / name: record.sha256 for name, record in manifest.files.items()}
    verify(hash_files(expected), expected)
    return f"all {len(expected)} files agree with the manifest"


def _describe(config: ModelConfig) -> list[tuple[str, str]]:
    return [
        ("family", f"{config.family}, rope {config.rope.kind} (theta {config.rope.theta:g})"),
        (
            "shape",
            f"{config.num_layers} layers, hidden {config.hidden_size}, FFN {config.intermediate_size}, "
            f"{config.num_heads} heads, {config.num_kv_heads} KV heads of {config.head_dim}, "
            f"vocabulary {config.vocab_size}{', tied embeddings' if config.tie_embeddings else ''}",
        ),
        ("parameters", f"{config.parameters:,}"),
        ("positions", f"{config.max_positions}"),
    ]


def _inspect_heads(file: Path) -> list[tuple[str, str]]:
    heads = read_heads(file)
    layers = {int(match["layer"]) for name in heads if (match := HEAD_NAME.fullmatch(name))}
    shapes = Counter((name.split(".")[-2], entry.shape, entry.dtype) for name, entry in heads.items())
    size = sum(entry.nbytes for entry in heads.values())
    return [
        ("format", f"retaining heads in a {'torch' if file.suffix in TORCH_SUFFIXES else 'safetensors'} file"),
        ("layers", f"{len(layers)}"),
        *((f"{matrix}", f"{shape} {dtype}, {count} times") for (matrix, shape, dtype), count in shapes.items()),
        ("size", size_text(size)),
    ]

"""Loading a model by name or folder: headers are checked at once, weights go to their place on a mesh later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from apb_jax.errors import UserError
from apb_jax.mesh import TP, check_host_memory
from apb_jax.model.config import ModelConfig
from apb_jax.model.transformer import Transformer
from apb_jax.model.weights import partition_specs
from apb_jax.typed import check_value
from apb_jax.weights.finite import check_finite
from apb_jax.weights.folding import fold, why_not
from apb_jax.weights.generation_config import read_stop_ids
from apb_jax.weights.gguf_file import read_gguf
from apb_jax.weights.gguf_header import is_gguf
from apb_jax.weights.hf_folder import HEADS_FILE, read_config, read_entries, read_json
from apb_jax.weights.locate import Located, cached_heads, is_orbax, locate, locate_heads
from apb_jax.weights.manifest import check_sizes, read_manifest
from apb_jax.weights.mapping import RETAINING_HEADS, Rule, check, rules_for, sizes_of
from apb_jax.weights.orbax_folder import check_parameters, restore
from apb_jax.weights.published_fp8 import flattened, is_fp8
from apb_jax.weights.quantised import check_scales, dequantise_matrix, quantise_matrix, wide_sharding, without
from apb_jax.weights.retaining_heads import check_heads, read_heads, split_heads
from apb_jax.weights.safetensors_header import TensorEntry
from apb_jax.weights.stream import Progress, stream
from apb_jax.weights.tied import without_equal_head
from apb_jax.weights.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {
    "bf16": jnp.bfloat16,
    "bfloat16": jnp.bfloat16,
    "fp32": jnp.float32,
    "f32": jnp.float32,
    "float32": jnp.float32,
}
PUBLISHED_HIDDEN = 1024
"""Width of fc1 in every published set of retaining heads (APB 7.7)."""
QKV = ("layers.q", "layers.k", "layers.v")
PRESET_SIZES = (
    "family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
)  # fmt: skip


class WeightSource(Protocol):
    """Where weights come from. ``place`` puts them on the devices of ``shardings`` (our path -> sharding)."""

    @property
    def folded(self) -> bool:
        """Whether it holds folded retaining heads ready made."""
        ...

    @property
    def fp8(self) -> bool:
        """Whether it holds the layers' matrices in e4m3 with a scale an output."""
        ...

    def place(
        self, model: LoadedModel, shardings: dict[str, Sharding], progress: Progress | None
    ) -> dict[str, jax.Array]: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model whose checkpoint passed every check that headers allow; ``place`` reads the weights."""

    name: str
    config: ModelConfig
    dtype: Any
    retaining_hidden: int | None
    source: WeightSource
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None
    fold_heads: bool = False
    """Whether the retaining heads are folded into the QKV projections (same scores, less work)."""
    fp8: bool = False
    """Whether the layers' matrices are held in e4m3 with a scale an output."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer by ``generation_config.json``."""

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.build(0)))

    def build(self, seed: int) -> Transformer:
        """The module with random weights."""
        return Transformer(
            self.config,
            retaining_hidden=self.retaining_hidden,
            dtype=self.dtype,
            rngs=nnx.Rngs(seed),
            folded_heads=self.fold_heads,
            fp8=self.fp8,
        )

    def graph(self) -> nnx.GraphDef:
        """The module's structure without weights."""
        return self._abstract[0]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter by path ("layers.q")."""
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _flat(self._abstract[1])}

    def partitions(self) -> nnx.State:
        """The partition of every parameter over the mesh axis "tp", in the module's structure."""
        return partition_specs(self._abstract[1])

    def specs(self) -> dict[str, PartitionSpec]:
        """The same by path."""
        return dict(_flat(self.partitions()))

    def shardings(self, mesh: Mesh | None) -> dict[str, Sharding]:
        """Where every parameter goes: split over the mesh axis "tp" as the model says, replicated over the others."""
        if mesh is None:
            device = SingleDeviceSharding(jax.devices()[0])
            return {path: device for path, _ in _flat(self._abstract[1])}
        self.check_tp(mesh.shape["tp"])
        return {path: NamedSharding(mesh, spec) for path, spec in self.specs().items()}

    def check_tp(self, tp: int) -> None:
        """Refuse a tensor-parallel width that some parameter cannot be split into."""
        specs = self.specs()
        for path, shape in self.shapes().items():
            for size, axis in zip(shape.shape, specs[path], strict=False):
                if axis == "tp" and size % tp:
                    raise UserError(
                        f"tp={tp} does not divide {path} {shape.shape} (axis of {size}); "
                        f"choose a tp that divides {self.config.num_kv_heads} KV heads"
                    )

    def place(self, mesh: Mesh | None, progress: Progress | None = None) -> nnx.State:
        """Weights in their sharding on ``mesh`` (axes "sp", "tp"; None: the first device). Reads the files now.

        UserError where a machine without GPU has no memory for a copy for every simulated device of "sp".
        """
        if mesh is not None and jax.default_backend() == "cpu":
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in self.shapes().values())
            check_host_memory(size, len(mesh.local_devices) // mesh.shape[TP])
        shardings = self.shardings(mesh)
        if not self.fold_heads or self.source.folded:
            arrays = self.source.place(self, shardings, progress)
            check_finite(arrays, self.name)
        else:
            arrays = self._folded(mesh, shardings, progress)
        check_scales(arrays, self.name)
        state = self._abstract[1]
        return nnx.from_flat_state(
            [(path, leaf.replace(arrays[_path(path)])) for path, leaf in nnx.to_flat_state(state)]
        )

    def _folded(self, mesh: Mesh | None, shardings: dict[str, Sharding], progress: Progress | None) -> dict[str, Any]:
        """Weights with folded heads: q, k and v are quantised behind the folding, unless they were stored so."""
        plain = replace(self, fold_heads=False)
        targets = plain.shardings(mesh)
        quantising = QKV if self.fp8 and not self.source.fp8 else ()
        arrays = plain.source.place(plain, without(targets, quantising), progress)
        check_finite(arrays, self.name)
        wide = {path: dequantise_matrix(path, arrays, self.dtype, wide_sharding(path, targets)) for path in QKV
                if path not in arrays}  # fmt: skip
        arrays |= fold(arrays | wide, self.shapes(), shardings)
        for path in quantising:
            arrays |= dict(quantise_matrix(path, arrays.pop(path), targets))
        return arrays


@dataclass(frozen=True)
class RandomWeights:
    """Initialised on the devices, in their sharding: for benchmarks and tests."""

    seed: int = 0
    folded: bool = True
    fp8: bool = False

    def place(
        self, model: LoadedModel, shardings: dict[str, Sharding], progress: Progress | None
    ) -> dict[str, jax.Array]:
        """Every parameter at random; nothing passes through the host."""
        init = jax.jit(lambda: dict(_flat(nnx.state(model.build(self.seed)))), out_shardings=shardings)
        return init()


@dataclass(frozen=True)
class HFFolder:
    """An HF folder or a GGUF file, checked: which tensor of which file becomes which parameter."""

    path: Path
    entries: dict[str, TensorEntry]
    folded: bool = False
    fp8: bool = False

    @classmethod
    def open(cls, path: Path, heads: Path | None) -> tuple[HFFolder, ModelConfig, int | None]:
        """(source, configuration, width of the retaining heads): every header against every rule."""
        fp8 = False
        if is_gguf(path):
            found, config, _ = read_gguf(path)
        else:
            found, config = read_entries(path), read_config(path)
            fp8 = is_fp8(read_json(path / "config.json"))
            found = flattened(found) if fp8 else found
        entries, own_heads = split_heads(found)
        head_entries = read_heads(heads) if heads else own_heads
        hidden = check_heads(head_entries, config) if head_entries else None
        entries |= head_entries
        if config.tie_embeddings:
            entries = without_equal_head(entries)
        check(
            entries,
            rules_for(config, hidden, fp8=fp8),
            family=config.family,
            sizes=sizes_of(config, hidden),
            num_layers=config.num_layers,
        )
        return cls(path, entries, fp8=fp8), config, hidden

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of the tensors, as safetensors spells them."""
        return {entry.dtype for entry in self.entries.values()}

    def place(
        self, model: LoadedModel, shardings: dict[str, Sharding], progress: Progress | None
    ) -> dict[str, jax.Array]:
        """Read the files, a few layers at a time."""
        rules = rules_for(model.config, model.retaining_hidden, fp8=self.fp8)
        return _stream(self.entries, rules, model, shardings, progress)


@dataclass(frozen=True)
class OrbaxFolder:
    """A converted folder; ``heads``: retaining heads from another file in place of its own."""

    path: Path
    heads: dict[str, TensorEntry] | None = None
    folded: bool = False
    fp8: bool = False

    @classmethod
    def open(cls, path: Path, heads: Path | None) -> tuple[OrbaxFolder, ModelConfig, int | None]:
        """(source, configuration, width of the retaining heads): the manifest against sizes and configuration."""
        manifest = read_manifest(path)
        if manifest is None or manifest.kind != "orbax":
            raise UserError(f"{path} is no converted folder; `python -m converters hf` makes one")
        check_sizes(path, manifest)
        config = read_config(path)
        check_parameters(path, manifest, config)
        if heads is None:
            return cls(path, folded=manifest.folded_heads), config, manifest.retaining_hidden
        entries = read_heads(heads)
        return cls(path, entries), config, check_heads(entries, config)

    def place(
        self, model: LoadedModel, shardings: dict[str, Sharding], progress: Progress | None
    ) -> dict[str, jax.Array]:
        """Restore straight into the shardings, whatever mesh the folder was converted on."""
        shapes = replace(model, fp8=False).shapes()
        rules = {rule.path: rule for rule in RETAINING_HEADS} if self.heads else {}
        own = {path: shape for path, shape in shapes.items() if path not in rules}
        wide = {path: wide_sharding(path, shardings) for path in own}
        arrays: dict[str, jax.Array] = {}
        for path, array in restore(self.path, own, wide, progress):
            arrays |= {path: array} if path in shardings else dict(quantise_matrix(path, array, shardings))
        if self.heads is None:
            return arrays
        return arrays | _stream(self.heads, RETAINING_HEADS, model, shardings, None)


def _stream(
    entries: dict[str, TensorEntry],
    rules: tuple[Rule, ...],
    model: LoadedModel,
    shardings: dict[str, Sharding],
    progress: Progress | None,
) -> dict[str, jax.Array]:
    return dict(
        stream(
            entries,
            rules,
            sizes=sizes_of(model.config, model.retaining_hidden),
            num_layers=model.config.num_layers,
            dtype=model.dtype,
            shardings=shardings,
            progress=progress,
        )
    )


def load(
    name_or_path: str | Path,
    *,
    weights: str | Path | None = None,
    heads: str | Path | None = None,
    dtype: str | None = None,
    fold_heads: bool | None = None,
) -> LoadedModel:
    """Find a model, check its headers, load its tokenizer; no weights are read yet.

    Args:
        name_or_path: a preset, an HF folder, a GGUF file, a converted (orbax) folder, or a hub id ("owner/name").
        weights: another folder or GGUF file to take configuration and weights from, or "random" (initialised on the
            devices).
        heads: retaining heads: a safetensors or torch ``.bin`` file, or the hub id of one; by default
            ``retaining_heads.safetensors`` inside the folder, or a preset's published heads if the hub cache has them.
        dtype: "bf16" or "float32"; by default bf16 on GPUs and float32 on CPUs.
        fold_heads: fold the retaining heads into the QKV projections (``apb_jax/weights/folding.py``); by default only
            where a converted folder holds them folded.

    Raises:
        UserError: what is wrong with the name, the folder, a header or a shape, in one line.
    """
    for name, value in (("name_or_path", name_or_path), ("weights", weights), ("heads", heads)):
        check_value(name, value, str, Path, *([] if name == "name_or_path" else [type(None)]))
        if "\0" in str(value):
            raise UserError(f"{name} {str(value)!r:.60} holds a NUL character")
    check_value("dtype", dtype, str, type(None))
    check_value("fold_heads", fold_heads, bool, type(None))
    parsed = parse_dtype(dtype)
    located = locate(name_or_path, weights_needed=weights is None)
    folder = located.folder
    if weights is not None and str(weights) != "random":
        folder = locate(weights).folder
    head_file = _head_file(heads, folder, located)
    if str(weights) == "random":
        source, config, hidden = _random(located, head_file)
    else:
        assert folder is not None  # locate() returns one where weights are needed
        opened = OrbaxFolder if is_orbax(folder) else HFFolder
        source, config, hidden = opened.open(folder, head_file)
    if located.preset is not None:
        _check_preset(located.name, located.preset.config, config, folder)
    if fold_heads and hidden is None:
        raise UserError(f"{located.name} has no retaining heads to fold; give heads=FILE")
    if fold_heads and (reason := why_not(config)):
        raise UserError(f"retaining heads of {located.name} cannot be folded: {reason}; leave fold_heads out")
    stored = isinstance(source, OrbaxFolder) and source.folded
    return LoadedModel(
        name=located.name,
        config=config,
        dtype=parsed,
        retaining_hidden=hidden,
        source=source,
        tokenizer=load_tokenizer(folder) if folder else None,
        folder=folder,
        fold_heads=stored if fold_heads is None else fold_heads,
        fp8=source.fp8,
        stop_ids=read_stop_ids(folder) if folder and folder.is_dir() else (),
    )


def _head_file(heads: str | Path | None, folder: Path | None, located: Located) -> Path | None:
    if heads is not None:
        return locate_heads(heads)
    if folder is not None and not is_orbax(folder) and (folder / HEADS_FILE).exists():
        return folder / HEADS_FILE
    if located.preset is not None and located.preset.heads_hub_id and located.hub_id:
        return cached_heads(located.preset.heads_hub_id)
    return None


def _random(located: Located, head_file: Path | None) -> tuple[WeightSource, ModelConfig, int | None]:
    """Random weights; retaining heads of the published width where the model has published heads or a file is given."""
    if located.preset is not None:
        config = located.preset.config
    else:
        assert located.folder is not None  # only presets are located without a folder
        config = read_gguf(located.folder)[1] if is_gguf(located.folder) else read_config(located.folder)
    if head_file is not None:
        return RandomWeights(), config, check_heads(read_heads(head_file), config)
    published = located.preset is not None and located.preset.heads_hub_id
    return RandomWeights(), config, PUBLISHED_HIDDEN if published else None


def _check_preset(name: str, preset: ModelConfig, config: ModelConfig, folder: Path | None) -> None:
    for field in PRESET_SIZES:
        if getattr(preset, field) != getattr(config, field):
            raise UserError(
                f"{folder} is not {name!r}: its {field} is {getattr(config, field)}, the preset's is "
                f"{getattr(preset, field)}; give the folder itself as the model"
            )


def parse_dtype(dtype: str | None) -> Any:
    """The array dtype of a name; None: bf16 on accelerators, float32 on CPUs."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; choose bf16 or float32")
    return jnp.dtype(DTYPES[dtype])


def _flat(state: Any) -> list[tuple[str, Any]]:
    """(path, array or spec) of every parameter of an nnx State."""
    return [(_path(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]


def _path(path: Any) -> str:
    return ".".join(map(str, path))

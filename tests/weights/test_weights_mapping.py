"""The mapping tables: the six errors, agreement with the model, agreement with its partition specs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import RETAINING_HIDDEN, random_tensors, tiny_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from apb_jax.model.families import FAMILIES
from apb_jax.model.weights import partition_specs
from apb_jax.weights import mapping
from apb_jax.weights.checkpoint import LoadedModel, RandomWeights, _flat, load
from apb_jax.weights.mapping import rules_for

Q0 = "model.layers.0.self_attn.q_proj.weight"


def edit(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def tie(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))


def second_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    save_file({Q0: np.zeros((32, 24), np.float32)}, folder / "part-2.safetensors")


CASES = {
    "unmapped": (edit(lambda t: t.update(extra=t[Q0])), mapping.UnmappedTensor, ["'extra'", "llama"]),
    "fused": (
        edit(lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": t[Q0]})),
        mapping.UnmappedTensor,
        ["qkv_proj", "fused"],
    ),
    "bias": (
        edit(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q0]})),
        mapping.UnexpectedTensor,
        ["q_proj.bias", "llama", "does not have it"],
    ),
    "unexpected layer": (
        edit(lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": t[Q0]})),
        mapping.UnexpectedTensor,
        ["model.layers.3", "layers 0 to 2", "-> layers.q"],
    ),
    "unexpected head": (tie, mapping.UnexpectedTensor, ["lm_head.weight", "tie_word_embeddings"]),
    "duplicated": (second_file, mapping.DuplicatedTensor, [Q0, "part-1.safetensors", "part-2.safetensors"]),
    "missing": (edit(lambda t: t.pop(Q0)), mapping.MissingTensor, [Q0, "-> layers.q"]),
    "missing head": (edit(lambda t: t.pop("lm_head.weight")), mapping.MissingTensor, ["tie_word_embeddings"]),
    "shape": (
        edit(lambda t: t.update({Q0: t[Q0].T.copy()})),
        mapping.WrongShape,
        [Q0, "(24, 32)", "(32, 24)", "-> layers.q"],
    ),
    "dtype": (
        edit(lambda t: t.update({Q0: t[Q0].astype(np.int8)})),
        mapping.WrongDtype,
        [Q0, "I8", "BF16", "-> layers.q"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_six_errors_name_tensor_and_rule(case: str, tmp_path: Path) -> None:
    damage, error, words = CASES[case]
    folder = write_checkpoint(tmp_path / "model")
    damage(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_rules_cover_the_model_exactly(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_embeddings=tied)
    model = LoadedModel("t", config, np.dtype(ml_dtypes.bfloat16), RETAINING_HIDDEN, RandomWeights(), None, None)
    rules = {rule.path: rule for rule in rules_for(config, RETAINING_HIDDEN)}
    shapes = model.shapes()
    assert set(rules) == set(shapes)
    specs = dict(_flat(partition_specs(model._abstract[1])))
    tensors = random_tensors(config, tuple(rules.values()))
    for path, rule in rules.items():
        shape = tensors[rule.names(config.num_layers)[0]].shape
        if rule.columns:
            columns = rule.column_range(mapping.sizes_of(config, RETAINING_HIDDEN))
            shape = (*shape[:-1], columns.stop - columns.start)
        ours = shape[::-1] if rule.transpose else shape
        assert ((config.num_layers, *ours) if rule.stacked else ours) == shapes[path].shape, rule
        # Heads, FFN columns and the vocabulary are split, each on the axis that holds them; nothing else is.
        split = [shape for shape, axis in zip(shapes[path].shape, specs[path], strict=False) if axis == "tp"]
        widths = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 40, "up": 40, "down": 40, "head": 48, "fc2": 2}
        name = path.split(".")[-1].removesuffix("_bias").removeprefix("fc1_")
        assert split == ([widths[name]] if name in widths else []), rule


def test_old_rotary_buffers_are_not_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    edit(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))(folder)
    assert load(folder).config == tiny_config()

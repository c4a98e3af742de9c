"""Published FP8 checkpoints as they are, quantising while streaming, folded heads, what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_checkpoints import tiny_config, write_checkpoint
from safetensors.numpy import save_file

import apb_jax
from apb_jax.errors import UserError
from apb_jax.precision import Precision
from apb_jax.run import main as run_main
from apb_jax.weights import stream
from apb_jax.weights.mapping import MissingTensor, WrongDtype, WrongShape
from apb_jax.weights.safetensors_header import DTYPES, read_header
from converters.__main__ import main as converters_main
from converters.convert import convert_model
from converters.quantize import quantize

FP8 = Precision(weights="fp8")
CONFIG = tiny_config(hidden_size=64, intermediate_size=128, num_layers=2, head_dim=16)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DYNAMIC: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                "observer": None, "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
            },
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": 1.46,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
"""As llm-compressor wrote it for published FP8-dynamic models."""
FBGEMM = {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"}


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    """By name; the library's own reader for numpy does not know e4m3."""
    found = {entry.name: np.empty(entry.shape, DTYPES[entry.dtype]) for entry in read_header(file)}
    for entry in read_header(file):
        entry.read_into(found[entry.name])
    return found


def is_matrix(name: str) -> bool:
    return any(f".{part}.weight" in name for part in PROJECTIONS)


def publish(source: Path, out: Path, scheme: dict[str, Any], scale_dtype: Any, **more: np.ndarray) -> Path:
    """``source`` in the published layout, made with numpy alone; ``more``: further tensors, by name."""
    out.mkdir()
    tensors: dict[str, np.ndarray] = {}
    for name, array in tensors_of(source / "model.safetensors").items():
        if not is_matrix(name):
            tensors[name] = array
            continue
        wide = array.astype(np.float32)
        scale = (np.abs(wide).max(axis=1, keepdims=True) / 448).astype(scale_dtype)
        values = np.clip(wide / scale.astype(np.float32), -448, 448)
        tensors |= {name: values.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale": scale}
    save_file(tensors | more, out / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"quantization_config": scheme}))
    return out


def dequantised(source: Path, out: Path) -> Path:
    """The unquantised folder, in float32, that a published one stands for."""
    out.mkdir()
    found = tensors_of(source / "model.safetensors")
    tensors = {name: array for name, array in found.items() if not name.endswith(".input_scale_ub")}
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale")}
    for name in [name for name in tensors if is_matrix(name)]:
        tensors[name] = tensors[name].astype(np.float32) * scales[f"{name}_scale"].astype(np.float32)
    save_file(tensors, out / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    del settings["quantization_config"]
    (out / "config.json").write_text(json.dumps(settings))
    return out


def arrays(model: Any, mesh: Any = None) -> dict[str, np.ndarray]:
    state = model.place(mesh)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def logits(folder: Path, **settings: Any) -> np.ndarray:
    engine = apb_jax.Engine(apb_jax.load(folder, dtype="float32"), "full", apb_jax.make_mesh(1), **settings)
    assert engine.settings.precision == FP8
    session = engine.prefill([engine.prompt(list(range(2, 42)), [7, 8, 9])])
    return np.asarray(session.logits([[5, 6]])[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fp8") / "plain", CONFIG, heads=True)


@pytest.mark.parametrize(("scheme", "scale_dtype"), [(DYNAMIC, ml_dtypes.bfloat16), (FBGEMM, np.float32)])
def test_published_checkpoints_match_their_dequantised_form(
    plain: Path, tmp_path: Path, scheme: dict[str, Any], scale_dtype: Any
) -> None:
    """Values and scales as they lie; the same logits as the dequantised weights give when they are quantised again."""
    bound = {f"model.layers.{n}.mlp.up_proj.input_scale_ub": np.asarray([1200.0], np.float32) for n in range(2)}
    folder = publish(plain, tmp_path / "fp8", scheme, scale_dtype, **(bound if scheme is FBGEMM else {}))
    model = apb_jax.load(folder, dtype="float32")
    assert model.fp8
    held, stored = arrays(model), tensors_of(folder / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        np.testing.assert_array_equal(held["layers.down_fp8"][layer].view(np.uint8), stored[name].view(np.uint8))
        np.testing.assert_array_equal(held["layers.down_scale"][layer], stored[f"{name}_scale"][:, 0].astype("f4"))
    if scheme is FBGEMM:
        return  # the same arrays: the same logits
    wide = dequantised(folder, tmp_path / "wide")
    np.testing.assert_allclose(logits(folder), logits(wide, precision=FP8), atol=2e-3, rtol=0)


def test_quantised_while_streaming(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer as in one block, split over a mesh as on one device."""
    model = apb_jax.Engine(apb_jax.load(plain), "full", apb_jax.make_mesh(1), precision=FP8).model
    whole = arrays(model)
    monkeypatch.setattr(stream, "STAGING_BYTES", 1)
    for mesh in (None, apb_jax.make_mesh(2, 2)):
        for path, array in arrays(model, mesh).items():
            np.testing.assert_array_equal(array.view(np.uint8), whole[path].view(np.uint8), err_msg=path)


def test_quantize_writes_what_the_engine_would_make(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The converter's folder is a published one with heads beside it; converted folders are quantised on their way."""
    assert converters_main(["quantize", str(plain), "--out", str(tmp_path / "fp8")]) in (0, None)
    assert "wrote" in capsys.readouterr().out
    made = arrays(apb_jax.load(tmp_path / "fp8", dtype="float32"))
    mesh = apb_jax.make_mesh(1)
    convert_model(str(plain), tmp_path / "orbax")
    for source in (plain, tmp_path / "orbax"):
        model = apb_jax.Engine(apb_jax.load(source, dtype="float32"), "full", mesh, precision=FP8).model
        for path, array in arrays(model, mesh).items():
            np.testing.assert_array_equal(array.view(np.uint8), made[path].view(np.uint8), err_msg=path)
    for again, words in ((tmp_path / "fp8", "FP8 checkpoint already"), (tmp_path / "orbax", "no HF folder")):
        with pytest.raises(UserError, match=words):
            quantize(str(again), tmp_path / "again")
    with pytest.raises(UserError, match="loads as it is; convert the unquantised one"):
        convert_model(str(tmp_path / "fp8"), tmp_path / "again")
    with pytest.raises(UserError, match=r"sizes that 16 divides; layers.q has 24"):
        quantize(str(write_checkpoint(tmp_path / "odd")), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_heads_are_folded_before_quantisation(plain: Path, tmp_path: Path) -> None:
    """The folded product is the wide one bit for bit; of a published checkpoint, what its matrices stand for."""
    mesh = apb_jax.make_mesh(1)

    def folded(folder: Path, **settings: Any) -> dict[str, np.ndarray]:
        model = apb_jax.load(folder, dtype="float32", heads=plain / "retaining_heads.safetensors", fold_heads=True)
        return arrays(apb_jax.Engine(model, "full", mesh, **settings).model, mesh)

    wide, narrow = folded(plain), folded(plain, precision=FP8)
    np.testing.assert_array_equal(narrow["layers.fc1_folded"], wide["layers.fc1_folded"])
    assert "layers.q_fp8" in narrow
    assert "layers.q" not in narrow
    published = folded(publish(plain, tmp_path / "fp8", DYNAMIC, np.float32))
    gap = np.abs(published["layers.fc1_folded"] - wide["layers.fc1_folded"]).max()
    assert 0 < gap < 0.1 * np.abs(wide["layers.fc1_folded"]).max()


GATE = "model.layers.1.mlp.gate_proj.weight"


def edit(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A change to the tensors of a folder."""

    def apply(folder: Path) -> None:
        tensors = tensors_of(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def scheme(**changes: Any) -> Callable[[Path], None]:
    """A change to ``quantization_config``; keys "part.name" reach into the group."""

    def apply(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        found = settings["quantization_config"]
        for name, value in changes.items():
            part, _, key = name.partition("__")
            if key:
                found["config_groups"]["group_0"][part][key] = value
            else:
                found[name] = value
        (folder / "config.json").write_text(json.dumps(settings))

    return apply


FAULTS: dict[str, tuple[Callable[[Path], None], type[UserError], str]] = {
    "a scale is missing": (edit(lambda t: t.pop(f"{GATE}_scale")), MissingTensor, f"'{GATE}_scale' is in no file"),
    "a scale of another size": (
        edit(lambda t: t.update({f"{GATE}_scale": np.ones((3, 1), np.float32)})), WrongShape,
        rf"'{GATE}_scale' .* has shape \(3,\); config.json demands \(128,\)",
    ),
    "a scale a block": (
        edit(lambda t: t.update({f"{GATE}_scale": np.ones((1, 2), np.float32)})), WrongShape,
        r"has shape \(1, 2\)",
    ),
    "a layer left unquantised": (
        edit(lambda t: t.update({GATE: np.ones((128, 64), np.float32)})), WrongDtype,
        rf"'{GATE}' .* dtype F32; weights are one of F8_E4M3; a checkpoint that leaves layers unquantised",
    ),
    "static activation scales": (
        edit(lambda t: t.update({GATE.replace("weight", "input_scale"): np.ones(1, np.float32)})), UserError,
        r"gate_proj.input_scale' .*: static activation scales are not computed with",
    ),
    "static by its configuration": (
        scheme(input_activations__dynamic=False), UserError,
        r"input_activations.dynamic=False; it must be True \(static activation scales",
    ),
    "scales by block": (scheme(weights__strategy="block"), UserError, r"strategy='block'; it must be 'channel'"),
    "int8": (scheme(weights__type="int"), UserError, r"weights.type='int'; it must be 'float'"),
    "quantised KV": (scheme(kv_cache_scheme={"num_bits": 8}), UserError, r"kv_cache_scheme=.*; it must be null"),
    "another method": (scheme(quant_method="awq"), UserError, r"quant_method 'awq'.*supported: .*compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(plain: Path, tmp_path: Path, fault: str) -> None:
    folder = publish(plain, tmp_path / "fp8", DYNAMIC, np.float32)
    break_it, error, words = FAULTS[fault]
    break_it(folder)
    with pytest.raises(error, match=words):
        apb_jax.load(folder)


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, r"layers.gate_scale holds 1 scales that are not above 0"), (np.nan, "layers.gate_scale")]
)
def test_scales_that_lose_an_output_are_refused(plain: Path, tmp_path: Path, value: float, words: str) -> None:
    folder = publish(plain, tmp_path / "fp8", DYNAMIC, np.float32)
    edit(lambda t: t[f"{GATE}_scale"].__setitem__((5, 0), value))(folder)
    with pytest.raises(UserError, match=words):
        apb_jax.load(folder, dtype="float32").place(None)


def test_a_stored_precision_is_not_undone(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(plain, tmp_path / "fp8", DYNAMIC, np.float32)
    for flags in (["--precision", "bf16"], ["--weights-dtype", "model"]):
        assert run_main(["--model", str(folder), "--seq", "128", *flags]) == 2
        assert f"are stored in fp8, which is what runs; drop {' '.join(flags)}" in capsys.readouterr().err

"""Our logits against transformers' own, float32, every family and rope kind; recorded logits where torch is missing."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense import our_logits
from parity_cases import FAMILIES, RECORDED, checksum, prompts, transformers_logits, write_model

from apb_jax.weights.checkpoint import load
from converters.__main__ import main

TOLERANCE = 1e-4
HAS_TORCH = find_spec("torch") is not None
needs_torch = pytest.mark.skipif(
    not HAS_TORCH, reason="torch is not installed: recorded logits of transformers stand in for it (parity_cases.py)"
)


def close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(other).max() > 1  # logits worth comparing
        assert np.abs(one - other).max() <= TOLERANCE


@needs_torch
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(name, tmp_path / name)
    theirs = transformers_logits(folder, name)
    close(our_logits(load(folder, dtype="float32"), *prompts(name)), theirs)
    # What we export is the same model to transformers, in our spelling of the configuration too.
    assert main(["hf", str(folder), "--out", str(tmp_path / "orbax")]) == 0
    assert main(["export", str(tmp_path / "orbax"), "--out", str(tmp_path / "back")]) == 0
    for mine, original in zip(transformers_logits(tmp_path / "back", name), theirs, strict=True):
        np.testing.assert_array_equal(mine, original)
    own_spelling = tmp_path / "own"
    shutil.copytree(folder, own_spelling)
    (own_spelling / "config.json").write_text(json.dumps(load(folder).config.to_hf()))
    close(transformers_logits(own_spelling, name), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_recorded_ones(name: str, tmp_path: Path) -> None:
    recorded = np.load(RECORDED / f"{name}.npz")
    folder = write_model(name, tmp_path / name)
    assert checksum(folder) == pytest.approx(float(recorded["checksum"]), rel=1e-9), (
        "other random weights than recorded"
    )
    logits = [recorded[f"arr_{number}"] for number in range(len(prompts(name)))]
    close(our_logits(load(folder, dtype="float32"), *prompts(name)), logits)


@needs_torch
@pytest.mark.parametrize("parameters", [False, True])
def test_torch_file_of_heads(parameters: bool, tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import load_file

    rng = np.random.default_rng(3)
    state: dict[str, Any] = {"model.embed_tokens.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    for layer in range(3):
        for matrix, shape in (("fc1", (8, 80)), ("fc2", (2, 8))):
            tensor = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(torch.bfloat16)
            name = f"model.layers.{layer}.self_attn.{matrix}.weight"
            state[name] = torch.nn.Parameter(tensor, requires_grad=False) if parameters else tensor
    torch.save(state, tmp_path / "heads.bin")
    assert main(["heads", str(tmp_path / "heads.bin"), "--out", str(tmp_path / "heads.safetensors")]) == 0
    written = load_file(tmp_path / "heads.safetensors")
    assert len(written) == 6
    for name, array in written.items():
        np.testing.assert_array_equal(array.view(np.uint16), state[name].detach().view(torch.uint16).numpy())
    torch.save({"x": state["model.layers.0.self_attn.fc1.weight"].data.T}, tmp_path / "view.bin")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.bin")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in ("view.bin", "module.bin", "old.bin"):
        assert main(["heads", str(tmp_path / file), "--out", str(tmp_path / "no")]) == 2

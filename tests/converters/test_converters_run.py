"""``--model`` of ``apb_jax.run``: preset, HF folder, hub id and converted folder are the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_checkpoints import tiny_config, write_checkpoint

from apb_jax import presets
from apb_jax.run import main
from converters.__main__ import main as convert

HUB_ID = "someone/tiny-llama"


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same weights as a folder, converted, in the hub cache, and behind a preset."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (tmp_path / "folder", snapshot):
        write_checkpoint(folder, heads=True)
    assert convert(["hf", str(tmp_path / "folder"), "--out", str(tmp_path / "converted")]) == 0
    preset = presets.ModelPreset(tiny_config(), hub_id=HUB_ID, template="base")
    monkeypatch.setitem(presets.MODELS, "tiny-preset", preset)
    return [str(tmp_path / "folder"), str(tmp_path / "converted"), HUB_ID, "tiny-preset"]


def test_four_kinds_of_models(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    predictions = []
    for name in names:
        arguments = ["--model", name, "--seq", "96", "--sp", "2", "--max-new-tokens", "3", "--method", "full", "--json"]
        assert main(arguments) == 0, capsys.readouterr().err
        predictions.append(json.loads(capsys.readouterr().out.splitlines()[-1])["prediction"])
    assert predictions[0]
    assert len(set(map(str, predictions))) == 1, predictions


def test_offline_hub_id(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "someone/absent", "--seq", "96", "--sp", "2"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "hf download someone/absent --local-dir DIR" in line

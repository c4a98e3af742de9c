"""Every preset is the published config.json of its model, in the spelling of transformers 4 and in that of 5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig, with_string, with_yarn
from apb_jax.options import parse
from apb_jax.presets import MODELS
from apb_jax.rope.default import NoRope
from apb_jax.rope.yarn import YarnRope

CONFIGS = Path(__file__).parent / "configs"


@pytest.mark.parametrize("name", MODELS)
def test_preset_is_its_config(name: str) -> None:
    """``NAME.json``: ``rope_theta`` and ``rope_scaling``; ``NAME.v5.json``: ``rope_parameters``."""
    old, new = (json.loads((CONFIGS / f"{name}{end}.json").read_text()) for end in ("", ".v5"))
    assert "rope_theta" in old
    assert "rope_parameters" not in old
    assert "rope_parameters" in new
    assert not {"rope_theta", "rope_scaling"} & new.keys()
    preset = MODELS[name].config
    for spelling in (old, new):
        read = ModelConfig.from_hf(spelling)
        # The same layers, however they are grouped.
        assert [read.spec(layer) for layer in range(read.num_layers)] == [
            preset.spec(layer) for layer in range(preset.num_layers)
        ]
        assert read.to_hf() == preset.to_hf()


def test_every_fourth_layer_of_smollm3_has_no_positions() -> None:
    config = ModelConfig.from_hf(json.loads((CONFIGS / "smollm3-3b.json").read_text()))
    without = [layer for layer in range(config.num_layers) if isinstance(config.spec(layer).rope, NoRope)]
    assert without == list(range(3, 36, 4))
    content = json.loads((CONFIGS / "smollm3-3b.json").read_text())
    by_interval = content | {"no_rope_layers": None, "no_rope_layer_interval": 4}
    assert ModelConfig.from_hf(by_interval) == config
    for bad in ([1, 0], [2] * 36, "all"):
        with pytest.raises(UserError, match="36 numbers, 1 for a layer with RoPE"):
            ModelConfig.from_hf(content | {"no_rope_layers": bad})
    llama = json.loads((CONFIGS / "llama3.2-1b.json").read_text())
    with pytest.raises(UserError, match="which a llama has not"):
        ModelConfig.from_hf(llama | {"no_rope_layers": [1] * 16})


def test_yarn_by_one_flag() -> None:
    """``--rope yarn:4`` is Qwen2.5's card: factor 4 over the positions of config.json."""
    content = json.loads((CONFIGS / "qwen2.5-7b.json").read_text())
    card = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    factor = parse(["--rope", "yarn:4"]).yarn_factor
    assert factor == 4
    stretched = with_yarn(ModelConfig.from_hf(content), factor)
    assert stretched == ModelConfig.from_hf(content | card)
    assert stretched.max_positions == 131072
    assert with_string(stretched).rope.base == stretched.rope
    smollm3 = with_yarn(MODELS["smollm3-3b"].config, 2.0)
    assert (smollm3.rope, smollm3.max_positions) == (YarnRope(5e6, 2.0, 65536), 131072)
    assert smollm3.spec(3).rope == NoRope()
    with pytest.raises(UserError, match="this one has 'llama3' up to 131072 positions"):
        with_yarn(MODELS["llama3.2-1b"].config, 4.0)
    for bad, words in (("yarn:0.5", "at least|between 1"), ("yarn", "must be a number"), ("ntk:2", "yarn:FACTOR")):
        with pytest.raises(UserError, match=words):
            parse(["--rope", bad])

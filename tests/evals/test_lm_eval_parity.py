"""The harness's own ``hf`` model and ours on the same folder: the same figures on tasks of all three kinds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_checkpoints import tiny_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from apb_jax.synthetic.packaged import NOVEL
from apb_jax.tiny.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "torch", "accelerate")),
        reason="lm-eval, torch or accelerate is not installed",
    ),
    pytest.mark.filterwarnings("ignore"),  # both warn on import
]
POSITIONS = 96
TEXT = " ".join(NOVEL.read_text(encoding="utf-8")[20000:21500].split())


@pytest.fixture(scope="module", params=["adds a begin token", "adds none"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 96 positions whose logits are far from even, with a byte-level tokenizer."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("model") / "m",
        tiny_config(vocab_size=1024, max_positions=POSITIONS, bos_id=0, eos_ids=(1,)),
        dtype=np.float32,
    )
    tensors = load_file(path / "model.safetensors")
    loud = {name: 4 * tensor + ("norm" in name) for name, tensor in tensors.items()}
    save_file({name: tensor.astype(np.float32) for name, tensor in loud.items()}, path / "model.safetensors")
    train_tokenizer([NOVEL.read_text(encoding="utf-8")[:60000]], 1024).save_pretrained(path)
    if request.param == "adds none":
        file = path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    return path


def tasks() -> list[dict[str, Any]]:
    """A multiple-choice task, a rolling one whose text takes several windows, a generating one with a long prompt."""
    import datasets

    def of(*rows: dict[str, str]) -> Any:
        return lambda **_: {"test": datasets.Dataset.from_list(list(rows))}

    common = {"test_split": "test", "doc_to_target": "{{target}}"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        common
        | {
            "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "target_delimiter": " ",
            "doc_to_choice": ["his wife", "the old man in town", "x"], "metric_list": [{"metric": "acc", **mean}],
            "custom_dataset": of(*({"text": text, "target": "0"} for text in (TEXT[:60], TEXT, "", "One"))),
        },
        common
        | {
            "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
            "custom_dataset": of({"text": TEXT}, {"text": "The"}, {"text": TEXT[:300]}),
        },
        common
        | {
            "task": "generating", "output_type": "generate_until", "doc_to_text": "{{text}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
            "custom_dataset": of(*({"text": text, "target": "x"} for text in (TEXT[:80], TEXT))),
        },
    ]  # fmt: skip


def test_figures_of_the_harness_s_own_model(folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from evals.lm_eval_adapter import ApbJaxLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    ours = ApbJaxLM(model=str(folder), method="full", sp=1, dtype="float32")
    assert ours.max_length == theirs.max_length == POSITIONS
    results = [simple_evaluate(model, tasks=tasks(), bootstrap_iters=0, log_samples=True) for model in (theirs, ours)]
    for name in ("choices", "rolling", "generating"):
        hf, own = ([sample["resps"] for sample in one["samples"][name]] for one in results)
        assert len(hf) == len(own) >= 2
        for expected, got in zip(hf, own, strict=True):
            if name == "generating":
                assert got == expected
                continue
            flat = [np.ravel(np.asarray(x, dtype=object)) for x in (expected, got)]
            np.testing.assert_allclose(flat[1].astype(float), flat[0].astype(float), atol=1e-3)
        figures = [{k: v for k, v in one["results"][name].items() if isinstance(v, float)} for one in results]
        assert figures[1] == pytest.approx(figures[0], rel=1e-3)

"""The benchmarks on the real engine: a small model of random weights with a tokenizer, on simulated devices."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from apb_jax.errors import UserError
from apb_jax.synthetic.packaged import NOVEL
from apb_jax.tiny.tokenizer import train_tokenizer
from evals.__main__ import run
from evals.base import SystemSpec
from evals.perplexity.task import PerplexityPlan, run_perplexity
from evals.ruler import RulerTask
from evals.runner import run_config, run_tasks
from evals.store import RunFolder, read_rows
from evals.system import connect

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    train_tokenizer([NOVEL.read_text()[:60000]], 1024).save_pretrained(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def system_of(folder):
    return connect(SystemSpec(str(folder), ("full", "apb"), {}, "random", None, None, 2, 1))


def test_answers_report_what_ran(system_of):
    system = system_of("apb")
    answer = system.generate(NOVEL.read_text()[:2000], "\nWho is it?", 4)
    assert answer.prompt_tokens == system.count(NOVEL.read_text()[:2000]) + system.count("\nWho is it?") + 1
    assert 0 < answer.generated_tokens <= 4
    assert answer.prefill_s > 0
    assert answer.facts["method"] == "apb"
    assert answer.facts["anchor_tokens"] > 0
    assert system.describe()["device"].startswith("cpu")
    assert system.describe()["mesh"]["sp"] == 2


def test_virtual_shards_answer_like_devices(system_of, folder):
    virtual = connect(SystemSpec(str(folder), ("apb",), {}, "random", None, None, None, 1, shards=2))("apb")
    document = NOVEL.read_text()[:2000]
    got, want = (system.generate(document, "\nWho is it?", 4) for system in (virtual, system_of("apb")))
    assert got.text == want.text
    assert got.facts == want.facts
    assert virtual.describe()["shards"] == 2


def test_the_embedded_query_reaches_the_method(system_of):
    system, document = system_of("apb"), NOVEL.read_text()[:3000]
    own = system.generate(document, "\nWho is it?", 8)
    other = system.generate(document, "\nWho is it?", 8, embedded_query=" And where was the money, after all, hidden?")
    assert own.facts["method"] == other.facts["method"] == "apb"
    assert own.text != other.text


def test_a_short_document_is_reported_as_dense(system_of):
    facts = system_of("apb").generate("Hello there.", "\nWho?", 2).facts
    assert facts["method"] == "full"
    assert any("falls back to full" in note for note in facts["notes"])


def test_an_answer_may_fill_the_positions(system_of):
    system = system_of("full")
    text = NOVEL.read_text()
    ids = system.tokens.encode(text[:20000])[: 2048 - 8]
    document = system.tokens.decode(ids[:-4])
    query = system.tokens.decode(ids[-4:])
    assert system.count(document) + system.count(query) == 2040
    assert system.generate(document, query, 8).generated_tokens <= 7  # begin-of-text takes a place


def test_log_probabilities_do_not_depend_on_the_windows(system_of):
    """For exact attention a text scored in two windows is the text scored in one."""
    system = system_of("full")
    ids = system.tokens.encode(NOVEL.read_text()[:1500])[:120]
    whole = system.log_probs(ids[:20], ids[20:]).log_probs
    parts = [system.log_probs(ids[:a], ids[a:b]).log_probs for a, b in ((20, 70), (70, 120))]
    assert whole.shape == (100,)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
    assert (whole < 0).all()
    assert system.score_ids([0, *ids[:19]], ids[19:20], ids[20:30]).greedy is False  # random weights


def test_nothing_of_the_scored_text_is_embedded(system_of):
    """A later token must not change the score of an earlier one, in any method."""
    system = system_of("apb")
    ids = system.tokens.encode(NOVEL.read_text()[:12000])[:1500]
    one = system.log_probs(ids[:1400], ids[1400:1420])
    other = system.log_probs(ids[:1400], [*ids[1400:1419], 7])
    assert one.facts["method"] == "apb"
    np.testing.assert_allclose(one.log_probs[:-1], other.log_probs[:-1], atol=1e-6)


def test_a_model_without_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="has no tokenizer"):
        connect(SystemSpec(str(tmp_path), ("full",), {}, "random", None, None, 1, 1))


def test_the_command_runs_every_benchmark(folder, tmp_path, capsys):
    model = ["--model", str(folder), "--weights", "random", "--sp", "2", "--method", "apb,full"]
    assert run(["needle", *model, "--seq", "1k", "--depths", "2", "--out", str(tmp_path / "n")]) == 0
    assert run(["perplexity", *model, "--seq", "1k", "--window", "64", "--out", str(tmp_path / "p")]) == 0
    timing = ["--repeats", "1", "--new-tokens", "4", "--baseline", "full", "--out", str(tmp_path / "l")]
    assert run(["latency", *model, "--seq", "1k", *timing]) == 0
    assert run(["latency", *model, "--seq", "1k", "--repeats", "1", "--no-kv", "--out", str(tmp_path / "k")]) == 0
    (row,) = json.loads((tmp_path / "k" / "apb" / "metrics.json").read_text())["results"]
    assert row["ran"][0]["method"] == "apb"
    assert row["generated_tokens"] == 0 < row["prefill_s"]
    assert run(["report", str(tmp_path)]) == 0
    values = {
        method: json.loads((tmp_path / "p" / method / "metrics.json").read_text())["results"][0]["perplexity"]
        for method in ("apb", "full")
    }
    assert all(700 < value < 1500 for value in values.values())  # random weights: near the vocabulary's 1024
    assert values["apb"] != values["full"]
    assert (tmp_path / "l" / "res.csv").read_text().startswith("\tapb\tfull\n1K\t")


TIMES = ("prefill_s", "decode_s")


def test_a_batch_gives_the_rows_of_one_at_a_time(system_of, tmp_path):
    """Also where tasks ask for other answers, and where a run of one at a time is continued."""
    system, rows = system_of("apb"), {}
    tasks = [RulerTask(name, system.tokens, 600, 4, variant="ruler_fit") for name in ("niah_single_1", "passkey")]
    config = run_config("ruler", system, tasks, 4)
    quiet = {"console": Console(quiet=True), "label": "apb"}
    for name, batch, samples in (("one", 1, 4), ("two", 2, 4), ("continued", 1, 1), ("continued", 2, 4)):
        with RunFolder(tmp_path / name, config) as folder:
            run_tasks(system, tasks, folder, samples=samples, batch=batch, **quiet)
    for name in ("one", "two", "continued"):
        found = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(tmp_path / name)]
        rows[name] = sorted(found, key=lambda row: (row["task"], row["id"]))
    assert len(rows["one"]) == 8
    assert rows["two"] == rows["one"]
    assert rows["continued"] == rows["one"]


def test_a_length_beyond_the_packaged_models_positions(tmp_path, capsys):
    assert run(["needle", "--model", "tiny", "--seq", "64k", "--sp", "2", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: needle at length 65536: 65536 tokens exceed the model's 32768 positions")
    assert line.count("\n") == 1


def test_a_wrong_method_or_option_is_one_line(folder, tmp_path, capsys):
    base = ["needle", "--model", str(folder), "--weights", "random", "--sp", "2", "--seq", "1k", "--out", str(tmp_path)]
    assert run([*base, "--method", "apbb"]) == 2
    assert "did you mean 'apb'?" in capsys.readouterr().err
    assert run([*base, "--method", "apb", "--set", "apb.anchors=3"]) == 2
    assert "has no option 'anchors'" in capsys.readouterr().err


harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@harness
def test_the_harness_gives_our_score_on_our_samples(tmp_path):
    """lm_eval in a process of its own with the packaged model; answers and score equal those of our runner."""
    metadata = {"ruler_task": "niah_single_1", "length": 1500, "samples": 3, "variant": "ruler_fit"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment["HF_HOME"] = str(tmp_path / "hf")
    arguments = ["--model", "apb_jax", "--model_args", "model=tiny,method=apb,sp=2,dtype=float32"]
    arguments += ["--tasks", "apb_ruler", "--metadata", json.dumps(metadata), "--gen_kwargs", "max_gen_toks=128"]
    arguments += ["--log_samples", "--output_path", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-m", "evals", "lm_eval", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])

    system = connect(SystemSpec("tiny", ("apb",), {}, None, None, "float32", 2, 1))("apb")
    task = RulerTask("niah_single_1", system.tokens, 1500, 3, variant="ruler_fit")
    with RunFolder(tmp_path / "ours", run_config("ruler", system, [task], 3)) as run_folder:
        metrics = run_tasks(system, [task], run_folder, samples=3, console=Console(quiet=True), label="x")
    ours = list(read_rows(tmp_path / "ours"))
    assert [row["resps"][0][0] for row in theirs] == [row["pred"] for row in ours]
    score = json.loads(results.read_text())["results"]["apb_ruler"]["score,none"]
    assert 100 * score == pytest.approx(metrics["results"][0]["score"], abs=0.01)
    assert score > 0.5


@harness
@pytest.mark.filterwarnings("ignore")  # the harness and torch warn on import
def test_harness_requests(folder, system_of):
    """Log-likelihoods, rolling log-likelihoods, stop strings, batches and order."""
    from evals.lm_eval_adapter import ApbJaxLM

    system = system_of("full")
    lm = ApbJaxLM(model=str(folder), system=system, batch_size=2)
    text = ("The Saltrams had come back to town. " * 12).strip()
    (first, greedy), (shorter, _) = lm.loglikelihood([ask(text, " His wife"), ask(text + " His", " wife")])
    assert first < shorter < 0
    assert isinstance(greedy, bool)
    encode = system.tokens.encode
    assert first == pytest.approx(system.log_probs(encode(text), encode(" His wife")).log_probs.sum(), abs=1e-3)
    ((empty, _),) = lm.loglikelihood([ask("", "The wife")])
    assert empty < 0

    whole, word = lm.loglikelihood_rolling([ask(text), ask("The")])
    assert whole < word < 0
    lm.max_length = 65
    (windows,) = lm.loglikelihood_rolling([ask(text)])
    assert windows == pytest.approx(whole, rel=0.2)
    assert windows != whole
    lm.max_length = 2048

    requests = [ask(text * n, {"until": [], "max_gen_toks": 6}) for n in (1, 3, 2)]
    texts = lm.generate_until(requests)
    assert texts == ApbJaxLM(model=str(folder), system=system, batch_size=1).generate_until(requests)
    assert len(set(texts)) > 1
    stop = texts[0][3]
    assert lm.generate_until([ask(text, {"until": [stop], "max_gen_toks": 6})]) == [texts[0].split(stop)[0]]
    with pytest.raises(UserError, match="decodes greedily"):
        lm.generate_until([ask(text, {"until": [], "do_sample": True, "temperature": 0.7})])

    document, query = lm.split_ids("a b\nWho?", lm.tok_encode("a b\nWho?"))
    assert lm.tokenizer.decode(query) == "Who?"
    assert document[0] == lm.prefix_token_id
    fixed = ApbJaxLM(model=str(folder), system=system, split=3)
    assert len(fixed.split_ids(text, lm.tok_encode(text))[1]) == 3
    with pytest.raises(UserError, match="has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])


def ask(*args):
    return types.SimpleNamespace(args=args)


@pytest.mark.filterwarnings("ignore")  # torch warns on import
def test_perplexity_is_that_of_one_forward_pass_elsewhere(tmp_path):
    """The published protocol in windows of 200 gives the NLL of transformers' single pass over the same tokens."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    system = connect(SystemSpec("tiny", ("full",), {}, None, None, "float32", 2, 1))("full")
    plan = PerplexityPlan(system.tokens, {"novel": NOVEL.read_text()}, (700,), 200, "minference")
    with RunFolder(tmp_path, {"benchmark": "perplexity"}) as folder:
        run_perplexity(system, plan, folder, console=Console(quiet=True), label="x")
    (row,) = read_rows(tmp_path)

    path = Path(__file__).parents[2] / "apb_jax" / "tiny"
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([[system.tokenizer.bos_token_id, *system.tokens.encode(NOVEL.read_text())[:700]]])
    with torch.no_grad():
        log_probs = torch.log_softmax(other(ids).logits[0, :-1].float(), -1)
    nll = -log_probs[torch.arange(700), ids[0, 1:]][1:].mean().item()
    assert row["scored"] == 699
    assert row["nll"] == pytest.approx(nll, rel=1e-4)

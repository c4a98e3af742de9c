"""The command line: every mistake gets one line that names value, rule and nearest legal choice, and status 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from hf_checkpoints import tiny_config, write_checkpoint
from rich.console import Console

from apb_jax.arguments import length as parse_length
from apb_jax.errors import UserError
from apb_jax.options import RunConfig, parse
from apb_jax.run import choose_devices, decide_method, main
from apb_jax.weights.checkpoint import load


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Good and bad files by the names that the table uses."""
    folder = tmp_path_factory.mktemp("files")
    write_checkpoint(folder / "model", heads=True)
    write_checkpoint(folder / "bare")
    write_checkpoint(folder / "other", tiny_config(num_kv_heads=4), heads=True)
    cut = write_checkpoint(folder / "truncated")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (write_checkpoint(folder / "noconfig") / "config.json").unlink()
    broken = write_checkpoint(folder / "brokenconfig") / "config.json"
    broken.write_text(broken.read_text()[:-20])
    gpt = write_checkpoint(folder / "gpt")
    (gpt / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "book.txt").write_text("It was a dark and stormy night. " * 20)
    (folder / "weightless").mkdir()
    return {"dir": str(folder)} | {path.name: str(path) for path in folder.iterdir()}


MODEL = ["--model", "{model}", "--seq", "200", "--max-new-tokens", "4"]
BAD = [
    (["--document", "{dir}/bok.txt", "--query", "Who?"], "no such file; did you mean {book.txt}?"),
    (["--document", "{dir}", "--query", "Who?"], "is a folder; give one text file"),
    (["--document", "{empty.txt}", "--query", "Who?"], "is empty (0 bytes); it needs at least one word"),
    (["--document", "{blank.txt}", "--query", "Who?"], "is empty (4 bytes)"),
    (["--document", "{latin1.txt}", "--query", "Who?"], "is not UTF-8 text (byte 0xe9 at offset 3)"),
    (["--document", "{book.txt}"], "comes without a question; add --query TEXT"),
    (["--document", "{book.txt}", "--query", "  "], "--query is empty"),
    (["--query", "Who?"], "add --document FILE"),
    (["--document", "{book.txt}", "--query", "Who?", "--model", "{model}"], "has no tokenizer"),
    (["--document", "{book.txt}", "--query", "Who?", "--needle", "123"], "cannot be combined with --document"),
    (["--needle", "12ab"], "--needle is '12ab'; it must be 1 to 32 digits"),
    ([*MODEL, "--needle", "123"], "--needle needs a tokenizer"),
    (["--depth", "1.5"], "--depth is 1.5; it must be between 0 and 1 (nearest legal choice: 1)"),
    (["--depth", "nan"], "--depth is nan; it must be between 0 and 1"),
    (["--seq", "0"], "length '0' is not a number of tokens"),
    (["--seq", "12q"], "length '12q' is not a number of tokens; write for example 8192, 8k"),
    (["--seq", "-5"], "length '-5' is not a number of tokens"),
    (["--model", "{model}", "--seq", "30"], "--seq 30 leaves no room for a document"),
    (["--model", "{model}", "--seq", "1m"], "exceeds the 256 positions of model; nearest legal choice: 256"),
    ([*MODEL, "--sp", "7", "--tp", "2"], "needs 14 devices, here are 8"),
    (
        [*MODEL, "--sp", "2", "--shards", "3"],
        "--shards 3 is no multiple of the 2 devices on the sequence axis; nearest",
    ),
    ([*MODEL, "--sp", "7", "--slice-decode"], "7 devices do not divide the 32 query columns of the model; nearest"),
    ([*MODEL, "--sp", "0"], "--sp is 0; it must be between 1 and 1024"),
    ([*MODEL, "--sp", "two"], "--sp is 'two'; it must be a whole number, between 1 and 1024"),
    ([*MODEL, "--sp", "1", "--tp", "3"], "--tp 3 does not divide model's 2 KV heads; nearest legal choice: --tp 2"),
    (["--model", "llama3.1-9b"], "llama3.1-8b"),
    (["--model", "{dir}/nowhere"], "nowhere"),
    (["--model", "{truncated}"], "truncated"),
    (["--model", "{noconfig}"], "config.json"),
    (["--model", "{brokenconfig}"], "config.json"),
    (["--model", "{gpt}"], "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2"),
    ([*MODEL, "--weights", "{weightless}"], "{weightless} holds no config.json"),
    ([*MODEL, "--weights", "{dir}/none"], "no such folder"),
    ([*MODEL, "--heads", "{other}/retaining_heads.safetensors"], "fc"),
    ([*MODEL, "--heads", "{dir}/heads.safetensors"], "no such file"),
    ([*MODEL, "--heads", "{model}/config.json"], "config.json"),
    ([*MODEL, "--heads", "{model}/retaining_heads.safetensors", "--weights", "random"], "drop one of the two"),
    ([*MODEL, "--method", "abp"], "unknown method 'abp'; there are: "),
    ([*MODEL, "--method", "abp"], "did you mean 'apb'?"),
    ([*MODEL, "--method", "full", "--anchor", "32"], "method 'full' has no option 'anchor_tokens'"),
    ([*MODEL, "--anchor", "-3"], "--anchor is -3; it must be at least 0 (nearest legal choice: 0)"),
    ([*MODEL, "--passing", "-1"], "--passing is -1; it must be at least 0"),
    ([*MODEL, "--compare", "apb"], "--compare apb is the method itself"),
    ([*MODEL, "--compare", "fulll"], "did you mean 'full'?"),
    ([*MODEL, "--save", "{book.txt}"], "is a file; give a folder"),
    (["--model", "{bare}", "--fold-heads"], "has no retaining heads to fold"),
    ([*MODEL, "--set", "shared_anchor=no"], "shared_anchor is 'no'; it must be true or false"),
    ([*MODEL, "--set", "pool=4"], "pool is 4; it must be an odd number of rows"),
    ([*MODEL, "--anchor", "4", "--set", "anchor_tokens=8"], "anchor_tokens is given twice, by --set and by a flag"),
    ([*MODEL, "--set", "zigzag"], "--set 'zigzag' is not of the form FIELD=VALUE"),
    ([*MODEL, "--method", "ring", "--set", "zigzags=true"], "method 'ring' has no option 'zigzags'"),
    ([*MODEL, "--method", "streaming", "--sp", "2"], "runs on one shard, here are 2; nearest legal choice: --sp 1"),
    ([*MODEL, "--method", "auto", "--anchor", "4"], "--method auto decides itself"),
    ([*MODEL, "--rope", "string", "--string-offset", "-1"], "--string-offset is -1; it must be above 0"),
    ([*MODEL, "--scorer", "magic"], "invalid choice: 'magic'"),
    ([*MODEL, "--kernels", "cudnn", "--sp", "2"], "nearest legal choice: --kernels auto"),
    ([*MODEL, "--kernels", "fast"], "invalid choice: 'fast'"),
    ([*MODEL, "--dtype", "fp8"], "invalid choice: 'fp8'"),
    ([*MODEL, "--template", "chatml"], "unknown template 'chatml'; there are: model, llama3"),
    ([*MODEL, "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
    ([*MODEL, "--temperature", "-1"], "--temperature is -1; it must be at least 0"),
    ([*MODEL, "--top-p", "0"], "--top-p is 0; it must be between 0.0001 and 1"),
    ([*MODEL, "--seed", "-1"], "--seed is -1; it must be at least 0"),
    ([*MODEL, "--profile", "{book.txt}"], "is a file; give a folder"),
    (["--processes", "2"], "must be given together"),
    (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "2"], "it must lie in 0..1"),
    ([*MODEL, "--no-mass"], "--no-mass leaves a measurement of --compare out; add --compare METHOD"),
    ([*MODEL, "--rope", "ntk:2"], "--rope is 'ntk:2'; it must be string, or yarn:FACTOR such as yarn:4"),
    ([*MODEL, "--rope", "yarn:0.5"], "the factor of --rope yarn is 0.5; it must be between 1 and 1024"),
    (["--metod", "apb"], "unrecognized arguments: --metod apb; did you mean --method?"),
    (["run"], "unrecognized arguments: run"),
]


def fill(text: str, files: dict[str, str]) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda match: files[match[1]], text)


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a)[-50:] for a, _ in BAD])
def test_mistakes(
    arguments: list[str],
    words: str,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    assert main([fill(a, files) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert fill(words, files) in lines[0]


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "APB_JAX_CACHE": "off", "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "apb_jax.run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_ctrl_c(files: dict[str, str]) -> None:
    """Interrupted in the middle of a run: one line, status 2, no traceback."""
    process = command("--model", files["model"], "--seq", "200", "--compare", "full,ring,star,spava,xattention")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in errors.splitlines() if line] == ["error: interrupted"]


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "0.7", "--top-p", "0.9"],
        ["--compare", "full,ring,streaming", "--save", "out", "--sp", "2"],
        ["--sp", "7"],
        ["--fold-heads", "--dtype", "bf16", "--slice-decode"],
        ["--sp", "1", "--virtual-shards", "4"],
    ],
)
def test_json_is_the_last_line(
    options: list[str],
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A run on random weights, also on seven devices: the last line of standard output parses and is complete."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", files["model"], "--seq", "200", "--max-new-tokens", "6", "--json", *options]
    arguments += [] if "--sp" in options else ["--sp", "4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result: dict[str, Any] = json.loads(out)
    assert set(result) >= {
        "prediction", "ground_truth", "method", "mesh", "document_tokens", "prefill_s", "prefill_tokens_per_s",
        "decode_ms_per_token", "peak_bytes_per_device", "versions",
    }  # fmt: skip
    assert len(result["tokens"]) == 6
    assert result["document_tokens"] == 200 - 32 - 6
    assert result["peak_bytes_per_device"] > 0
    if "--compare" in options:
        assert [other["method"] for other in result["compare"]] == ["full", "ring", "streaming"]
        assert result["collectives_per_layer"] == {"all_gather": 1, "psum": 1}
        assert [other["mesh"]["sp"] for other in result["compare"]] == [2, 2, 1]
        assert result["method"] == "apb"
        for other in result["compare"]:
            assert 0 <= other["receipt"]["top1_agreement"] <= 1
            assert other["receipt"]["rows"] == 32 + 6
        shares = [one["recovered_mass"]["mean"] for one in (result, *result["compare"])]
        assert shares[1:3] == pytest.approx([1, 1], abs=1e-4)
        assert 0.5 < shares[0] < 1
        assert (result["dense_layers"], result["compare"][0]["dense_layers"]) == ([], list(range(result["layers"])))
        assert json.loads(Path("out/run.json").read_text(encoding="utf-8")) == result
        page = Path("out/run.md").read_text(encoding="utf-8")
        assert "|  | apb | full | ring | streaming |" in page
        assert "| attention mass recovered |" in page
        assert "Ground truth" not in page  # random ids: nothing to find
        assert page.count("receipt against") == 3


def test_the_help_s_own_examples_are_taken() -> None:
    assert parse(["--method", "ring", "--set", "order=plain"]).method_options == {"order": "plain"}
    assert parse(["--kernels", "triton"]).kernels == "triton"


@pytest.mark.parametrize(("seq", "length"), [(None, 900), ("600", 600), ("4k", 900)])
def test_auto_decides_for_the_document_that_is_given(
    monkeypatch: pytest.MonkeyPatch, seq: str | None, length: int
) -> None:
    """Not for a default length: shortened by --seq, never lengthened by it."""
    asked = []

    def choose(model: Any, tokens: int, devices: int, **settings: Any) -> Any:
        asked.append(tokens)
        return SimpleNamespace(method="apb", devices=devices, reason="so")

    monkeypatch.setattr("apb_jax.measure.choose.choose", choose)
    model = load("tiny")
    text = model.tokenizer.decode(model.tokenizer.encode("word " * 2000, add_special_tokens=False)[:900])
    config = parse(["--model", "tiny", "--method", "auto", *(["--seq", seq] if seq else [])])
    assert decide_method(config, model, text) == ("apb", len(jax.devices()), "so")
    assert asked == [length]


def test_a_verdict_for_every_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged model's needle beside full attention: one prediction, a verdict a column, no recovered mass."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    arguments = [
        "--seq",
        "512",
        "--sp",
        "1",
        "--compare",
        "full",
        "--no-mass",
        "--repeat",
        "0",
        "--max-new-tokens",
        "16",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"^needle +(found|missed) +found$", out, re.MULTILINE)
    assert (out.count("Prediction: "), out.count("Ground Truth: ")) == (1, 1)
    assert "attention mass" not in out
    assert "template question" in out


def test_starx_warns_of_its_merge(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    arguments = ["--model", files["model"], "--seq", "200", "--max-new-tokens", "2", "--sp", "2", "--method", "starx"]
    assert main([*arguments, "--json"]) == 0
    assert "starx merges as published" in " ".join(json.loads(capsys.readouterr().out)["notes"])


def test_kv_in_host_memory(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer, and what it costs before it begins."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    arguments = ["--model", files["model"], "--seq", "200", "--max-new-tokens", "4", "--sp", "2", "--json"]
    results = []
    for place in ("device", "host"):
        assert main([*arguments, "--kv", place]) == 0
        taken = capsys.readouterr()
        results.append(json.loads(taken.out))
        assert ("read for the question and again for every token" in taken.err) == (place == "host")
        assert results[-1]["kv_memory"] == place
    assert results[0]["prediction"] == results[1]["prediction"]


@pytest.mark.parametrize(("model", "devices"), [("tiny", 8), ("smollm2-135m", 1), ("./folder", 1)])
def test_devices_without_a_gpu(model: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight simulated ones for the packaged model, whose picture teaches; else one, unless asked."""
    asked: list[int] = []
    monkeypatch.setattr("apb_jax.mesh.has_accelerator", lambda: False)
    monkeypatch.setattr("apb_jax.mesh.simulate_devices", asked.append)
    for config in (RunConfig(model=model), RunConfig(model=model, sp=3)):
        choose_devices(config, Console(quiet=True))
    assert asked == [devices, 3]


def test_same_seed_same_answer(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    arguments = ["--model", files["model"], "--seq", "120", "--max-new-tokens", "8", "--sp", "2", "--json"]
    answers = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--temperature", "2", "--seed", seed]) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("8k", 8192), ("128K", 131072), ("1m", 1048576)])
def test_lengths(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


def test_no_arguments_is_the_needle_on_the_packaged_model() -> None:
    assert parse([]) == RunConfig(options=parse([]).options)
    assert parse([]).method_options == {}
    with pytest.raises(UserError):
        RunConfig(document="x")

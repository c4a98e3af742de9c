"""The trainer: its optimizer, a run that is killed and goes on, its output, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_checkpoints import tiny_config, write_checkpoint
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import load_file, safe_open

from apb_jax.errors import UserError
from apb_jax.retaining.corpus import Corpus, read_records
from apb_jax.retaining.train import Recipe, lengths_within, main, make_codec, order, train
from apb_jax.tiny import FOLDER
from apb_jax.weights.checkpoint import load

STEPS, EVERY = 40, 5


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """optax itself mixes weak floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "m", tiny_config(vocab_size=4096, max_positions=1024))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    rng = np.random.default_rng(0)
    words = ["river", "stone", "cloud", "door", "seven", "paper"]
    with path.open("w") as file:
        for _ in range(9):
            document = " ".join(words[i] for i in rng.integers(0, 6, 40))
            file.write(json.dumps({"document": document, "query": "What?", "answer": " " + words[0]}) + "\n")
    return path


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(model), "--data", str(data), "--out", str(out), "--hidden", "8", "--steps", str(STEPS),
        "--warmup", "3", "--save-every", str(EVERY), *more,
    ]  # fmt: skip


def test_optimizer_clips_values_and_follows_the_schedule() -> None:
    recipe = Recipe(hidden=4, steps=10, warmup=5, learning_rate=0.1, weight_decay=0.0)
    optimizer = recipe.optimizer()
    weight = jnp.zeros(3)
    state = optimizer.init(weight)
    sizes = []
    for _ in range(10):
        update, state = optimizer.update(jnp.asarray([100.0, -100.0, 0.5]), state, weight)
        sizes.append(np.asarray(update))
    # Clipped to +-0.5 element by element, all three look alike to Adam: the steps are the learning rate itself.
    rates = [*(0.1 * i / 5 for i in range(5)), *(0.1 * (5 - i) / 5 for i in range(5))]
    np.testing.assert_allclose(np.asarray(sizes)[:, 0], -np.asarray(rates), atol=1e-6)
    np.testing.assert_allclose(np.asarray(sizes)[:, 1], np.asarray(rates), atol=1e-6)
    np.testing.assert_allclose(np.asarray(sizes)[:, 2], -np.asarray(rates), atol=1e-6)


def test_order_is_a_permutation_per_epoch_from_any_step() -> None:
    whole = list(order(7, 3, 0, 21))
    assert [sorted(whole[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert list(order(7, 3, 10, 21)) == whole[10:]


def test_a_killed_run_goes_on_to_the_same_weights(model: Path, data: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    command = [sys.executable, "-m", "apb_jax.retaining.train", *arguments(model, data, killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed.safetensors.checkpoints" / "steps" / str(EVERY)
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()

    assert main(arguments(model, data, killed)) == 0
    assert main(arguments(model, data, whole, "--log", str(tmp_path / "log.json"))) == 0
    resumed, straight = load_file(killed), load_file(whole)
    assert resumed.keys() == straight.keys()
    for name in straight:
        np.testing.assert_array_equal(resumed[name], straight[name])

    config = load(str(model)).config
    assert len(straight) == 2 * config.num_layers
    assert straight["model.layers.0.self_attn.fc1.weight"].shape == (8, config.retaining_width)
    assert straight["model.layers.2.self_attn.fc2.weight"].shape == (config.num_kv_heads, 8)
    with safe_open(whole, "numpy") as file:
        assert json.loads(file.metadata()["recipe"])["hidden"] == 8
    log = json.loads((tmp_path / "log.json").read_text())["log"]
    assert log[-1]["step"] == STEPS
    assert load(str(model), heads=whole).retaining_hidden == 8

    # Another recipe does not go on from these checkpoints.
    assert main([*arguments(model, data, whole), "--learning-rate", "0.1"]) == 2

    # A finished run repeated keeps its file, to the byte, and its log.
    before, logged = whole.read_bytes(), (tmp_path / "log.json").read_text()
    assert main(arguments(model, data, whole, "--log", str(tmp_path / "log.json"))) == 0
    assert whole.read_bytes() == before
    assert (tmp_path / "log.json").read_text() == logged

    # More steps go on where it ended; fewer are refused.
    assert main([*arguments(model, data, whole, "--log", str(tmp_path / "log.json")), "--steps", str(STEPS + 10)]) == 0
    longer = json.loads((tmp_path / "log.json").read_text())["log"]
    assert [row["step"] for row in longer] == [STEPS, STEPS + 10]
    assert longer[:1] == log
    assert whole.read_bytes() != before
    assert main([*arguments(model, data, whole), "--steps", str(STEPS)]) == 2


def test_the_bar_moves_every_step(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    update = Progress.update

    def watched(self: Progress, *args: Any, completed: float | None = None, **more: Any) -> None:
        if completed is not None:
            seen.append(completed)
        update(self, *args, completed=completed, **more)

    monkeypatch.setattr(Progress, "update", watched)
    loaded = load(str(model))
    corpus = Corpus(tuple(read_records(data)), make_codec(loaded), 64, 16)
    train(loaded, corpus, Recipe(8, 7, 1), None, Console(quiet=True))
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_lengths_stay_within_the_models_positions(model: Path) -> None:
    loaded = load(str(model))  # 1,024 positions
    assert lengths_within(loaded, None, None) == (768, 256)
    assert lengths_within(loaded, 900, None) == (900, 124)
    assert lengths_within(loaded, None, 500) == (524, 500)
    wide = replace(loaded, config=replace(loaded.config, max_positions=131072))
    assert lengths_within(wide, None, None) == (10240, 1024)
    for asked in ((1000, 100), (1024, None), (None, 1024)):
        with pytest.raises(UserError, match="exceed the 1024 positions of m; nearest legal choice: --max-length"):
            lengths_within(loaded, *asked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--warmup", "40"], "warmup is 40"),
        (["--hidden", "-1"], "hidden is -1"),
        (["--max-length", "1000", "--max-answer", "100"], "exceed the 1024 positions"),
        (["--max-length", "3"], "--max-length is 3; it must be at least 16"),
        (["--embed-share", "1.5"], "1.5"),
        (["--save-every", "0"], "--save-every"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--data"], "no corpus"),
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    model: Path, data: Path, tmp_path: Path, change: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(model, data, tmp_path / "h.safetensors"), *change]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last

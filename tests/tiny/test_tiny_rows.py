"""Training rows, batch workers, and a training run of two steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from apb_jax.model.config import ModelConfig
from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import filler
from apb_jax.synthetic.sample import Piece, Question, Role, Sample, tokens_of
from apb_jax.tiny import FOLDER, QUERY_AT
from apb_jax.tiny.rows import DECISIVE_WEIGHT, lay_out, make_rows, spread_positions, training_world
from apb_jax.tiny.tokenizer import BOS_ID, EOS_ID


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(PreTrainedTokenizerFast.from_pretrained(FOLDER))


def test_layout_and_weights_of_a_row(encoder: Encoder) -> None:
    document = ((Piece(" The code is "), Piece("4821", Role.SECRET), Piece(".")),)
    asked, answer = (Piece("\nWhat is it?"),), (Piece(" ", Role.ANSWER), Piece("4821", Role.VALUE))
    sample = Sample("t", document, (Question(asked, answer, ("4821",)),))
    parts = [tokens_of((x,), encoder).tolist() for x in (document[0], asked, answer)]
    tokens, weights = lay_out(sample, encoder, embed=False)
    assert tokens.tolist() == [BOS_ID, *parts[0], *parts[1], *parts[2], EOS_ID]
    text = encoder.tokenizer.convert_ids_to_tokens(tokens.tolist())
    value = text.index("4")
    assert weights[0] == 0
    assert weights[value : value + 4].tolist() == [0, 0, 0, 0]
    assert weights[-1] == 1
    np.testing.assert_allclose(weights[-6:-1], [1, DECISIVE_WEIGHT, DECISIVE_WEIGHT, 1, 1])

    embedded, more = lay_out(sample, encoder, embed=True)
    assert embedded.tolist() == [BOS_ID, *parts[1], *parts[0], *parts[1], *parts[2], EOS_ID]
    assert not more[: QUERY_AT + len(parts[1])].any()
    np.testing.assert_array_equal(more[QUERY_AT + len(parts[1]) :], weights[QUERY_AT:])


def test_positions_increase_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    jumped = 0
    for _ in range(50):
        positions = spread_positions(rng, 300, 4096)
        assert positions[0] == 0 or (positions >= 0).all()
        assert (np.diff(positions) >= 1).all()
        assert positions[-1] < 4096
        jumped += positions[-1] > 299
    assert 10 < jumped < 40


WORKERS = """
import sys, numpy as np
from transformers import PreTrainedTokenizerFast
from apb_jax.tiny import FOLDER
from apb_jax.tiny.batches import BatchWorkers
from apb_jax.synthetic.haystack import filler
from apb_jax.synthetic.encoder import Encoder
encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(FOLDER))
with BatchWorkers(encoder, (filler(),), workers=2, seed=3, max_positions=1024) as workers:
    for _ in range(3):
        workers.request(2, 256)
    rows = [workers.take() for _ in range(3)]
    assert workers.pending == 0
np.savez(sys.argv[1], **{f"{name}{i}": getattr(r, name) for i, r in enumerate(rows) for name in r.__dict__})
"""


def test_batches_do_not_depend_on_the_workers(encoder: Encoder, tmp_path: Path) -> None:
    # A process of its own: forking this one, in which JAX runs threads, is not safe.
    file = tmp_path / "rows.npz"
    subprocess.run([sys.executable, "-c", WORKERS, str(file)], check=True, timeout=120)
    with np.load(file) as made:
        for i in range(3):
            expected = make_rows(training_world(encoder, (filler(),), [3, i]), 2, 256, 1024)
            for name in ("tokens", "positions", "weights"):
                np.testing.assert_array_equal(made[f"{name}{i}"], getattr(expected, name))


def test_packaged_files_are_one_small_model() -> None:
    hf = json.loads((FOLDER / "config.json").read_text())
    config = ModelConfig.from_hf(hf)
    assert {**hf, **config.to_hf()} == hf
    assert config.head_dim == 64
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert size < 20_000_000
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_id, *config.eos_ids)
    assert len(tokenizer.encode(" 9071234", add_special_tokens=False)) == 8
    assert not (FOLDER / "data" / "paul_graham_essays.json").exists()


def test_two_steps_make_a_loadable_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text. It has a few sentences. None of them is long! Does that matter? " * 20)
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "apb_jax.tiny.train", "--out", str(out), "--data", str(text), "--steps", "2",
        "--workers", "1", "--lengths", "256", "--batch-scale", "0.01", "--evaluate", "512", "--eval-rows", "1",
    ]  # fmt: skip
    # A process of its own: the workers are forked before JAX opens a device.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "training.json").read_text())
    assert summary["steps"] == 2
    assert set(summary["exact_match"]) >= {"single", "update"}
    assert all(np.isfinite(row["loss"]) for row in summary["loss"])
    from apb_jax.weights.checkpoint import load

    model = load(str(out))
    assert model.retaining_hidden is None
    assert model.tokenizer is not None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps is 0; it must be"),
        (["--steps", "1", "--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from apb_jax.tiny.train import main

    assert main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error

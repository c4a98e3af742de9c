"""Evaluations in two processes joined by ``jax.distributed``: the rows of one, written by the first of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_config
from hf_checkpoints import write_checkpoint

from apb_jax.synthetic.packaged import NOVEL
from apb_jax.tiny.tokenizer import train_tokenizer
from evals.__main__ import run
from evals.store import read_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a checkpoint, a tokenizer of its vocabulary."""
    config = tiny_config(vocab_size=512)
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), config, heads=True, dtype=np.float32)
    train_tokenizer([NOVEL.read_text()[:20000]], 512).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(arguments: list[str]) -> list[tuple[int, str, str]]:
    """Status, output and errors of the same command as two processes that join; each makes its share of the devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "APB_JAX_CACHE": "off"}
    environment.pop("XLA_FLAGS", None)
    joined = [*arguments, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    pair = [
        subprocess.Popen([sys.executable, "-m", "evals", *joined, str(i)], stdout=-1, stderr=-1, text=True,
                         env=environment)
        for i in range(2)
    ]  # fmt: skip
    outcomes = []
    for process in pair:
        out, err = process.communicate(timeout=240)
        outcomes.append((process.returncode, out, err))
    return outcomes


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was answered and scored, without what a clock said."""
    return [{name: row[name] for name in row if not name.endswith(("_s", "seconds"))} for row in read_rows(folder)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("benchmark", "methods", "options"),
    [
        ("needle", ("apb",), ["--depths", "2", "--text", str(NOVEL)]),
        ("perplexity", ("ring",), ["--window", "64", "--text", str(NOVEL)]),
    ],
)
def test_rows_are_those_of_one_process(
    model: Path, tmp_path: Path, benchmark: str, methods: tuple[str, ...], options: list[str]
) -> None:
    arguments = [benchmark, "--model", str(model), "--seq", "1k", "--sp", "2", "--method", ",".join(methods), *options]
    (first, out, err), (second, silent, other) = together([*arguments, "--out", str(tmp_path / "two")])
    assert (first, second) == (0, 0), err + other
    assert [line for line in silent.splitlines() if not line.startswith("[Gloo]")] == []
    assert out
    assert run([*arguments, "--out", str(tmp_path / "one")]) == 0
    for method in methods:
        ours, alone = (rows_of(tmp_path / name / method) for name in ("two", "one"))
        assert len(ours) > 0
        for row, expected in zip(ours, alone, strict=True):
            for name, value in expected.items():
                assert row[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
        two, one = (json.loads((tmp_path / name / method / "config.json").read_text()) for name in ("two", "one"))
        assert two | {"started": ""} == one | {"started": ""}


@pytest.mark.timeout(300)
def test_what_the_first_process_refuses_ends_the_other_too(model: Path, tmp_path: Path) -> None:
    """A length beyond the model's positions, found when both have joined."""
    outcomes = together(
        ["needle", "--model", str(model), "--seq", "64k", "--sp", "2", "--method", "ring", "--depths", "1",
         "--text", str(NOVEL), "--out", str(tmp_path / "two")]
    )  # fmt: skip
    assert outcomes[0][0] == 2
    assert "error: " in outcomes[0][2]
    assert "Traceback" not in outcomes[0][2] + outcomes[1][2]
    assert not (tmp_path / "two" / "ring").exists()

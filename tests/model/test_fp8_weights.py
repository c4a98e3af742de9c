"""Models whose matrices are in 8 bits: the arithmetic, meshes, slices, folded heads, refusals, what is reported."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.errors import UserError
from apb_jax.measure.beside import Beside
from apb_jax.measure.memory import Case, weight_bytes
from apb_jax.model.products import Fp8Matrix, project_all
from apb_jax.options import RunConfig
from apb_jax.plan import main as plan_main
from apb_jax.precision import Precision
from apb_jax.report import label
from apb_jax.run import main as run_main
from apb_jax.session_store.identity import identity
from apb_jax.weights.quantised import dequantise_matrix, quantise_matrix, refusal
from pallas_kernels import device
from pallas_kernels.float8 import dequantise, quantise

FP8 = Precision(weights="fp8")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16}
DOCUMENT, QUERY = ids(3, 251), ids(2, 9)


def answer(engine: apb_jax.Engine) -> np.ndarray:
    """Logits of the query rows and of three given tokens."""
    session = engine.prefill([engine.prompt(DOCUMENT, QUERY)])
    return np.asarray(session.logits([[5, 6, 7]])[0])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(**SIZES)


@pytest.fixture(scope="module")
def engines(model: Any) -> dict[str, apb_jax.Engine]:
    mesh = apb_jax.make_mesh(1)
    return {"wide": apb_jax.Engine(model, "full", mesh), "fp8": apb_jax.Engine(model, "full", mesh, precision=FP8)}


@pytest.fixture(scope="module")
def logits(engines: dict[str, apb_jax.Engine]) -> dict[str, np.ndarray]:
    return {name: answer(engine) for name, engine in engines.items()}


def test_products_are_those_of_both_operands_rounded() -> None:
    """``project_all`` with 8-bit matrices against float32 products of quantised and dequantised operands."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 64))
    pairs = [quantise(jax.random.normal(jax.random.key(n), (n, 64))) for n in (32, 48)]
    got = project_all(x, [Fp8Matrix(values, scale[:, 0]) for values, scale in pairs], None)
    rounded = np.asarray(dequantise(*quantise(x)))
    for out, pair in zip(got, pairs, strict=True):
        np.testing.assert_allclose(np.asarray(out), rounded @ np.asarray(dequantise(*pair)).T, atol=1e-4)


def test_the_model_changes_by_the_rounding_alone(logits: dict[str, np.ndarray], engines: Any) -> None:
    """A few percent from the wide model, and the same matrices as quantised afterwards."""
    assert 0.005 < distance(logits["fp8"], logits["wide"]) < 0.15
    wide, narrow = (dict(_arrays(engines[name])) for name in ("wide", "fp8"))
    for path in ("layers.q", "layers.down"):
        shardings = {row: narrow[row].sharding for row in narrow}
        for row, array in quantise_matrix(path, wide[path], shardings):
            assert np.array_equal(np.asarray(array).view(np.uint8), np.asarray(narrow[row]).view(np.uint8))
        back = dequantise_matrix(path, narrow, jnp.float32, wide[path].sharding)
        assert distance(np.asarray(back), np.asarray(wide[path])) < 0.03
    assert wide.keys() - narrow.keys() == {f"layers.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {narrow[path].dtype for path in ("embedding", "head", "norm", "layers.fc2", "layers.fc1_q")} == {
        jnp.dtype(jnp.float32)
    }


def _arrays(engine: apb_jax.Engine) -> Any:
    from flax import nnx

    return [(".".join(map(str, path)), leaf[...]) for path, leaf in nnx.to_flat_state(engine.state)]


@pytest.mark.parametrize(("sp", "tp", "sliced"), [(2, 2, True)])
def test_meshes_and_slices_agree(model: Any, logits: dict[str, np.ndarray], sp: int, tp: int, sliced: bool) -> None:
    """Rows of a share are quantised by their own maximum: as near to the wide model as without shares, not the same."""
    engine = apb_jax.Engine(model, "ring", apb_jax.make_mesh(sp, tp), precision=FP8, slice_decode=sliced)
    own = distance(logits["fp8"], logits["wide"])
    assert distance(answer(engine), logits["wide"]) < 1.5 * own


def test_compared_with_itself_at_another_precision(engines: dict[str, apb_jax.Engine]) -> None:
    """Weights of its own, the same model; the narrow one goes back to the wide one's very fingerprint."""
    engine = engines["fp8"]
    other = Beside(engine).of(engine.method, Precision())
    assert other.model.fp8 is False
    assert other.fingerprint == engines["wide"].fingerprint != engine.fingerprint
    assert label("full", other.settings.precision, engine) == "full@bf16"
    assert label("full", engine.settings.precision, engine) == "full"
    same = engine.with_method("full")
    assert same.programs is engine.programs


def test_sessions_know_their_precision(engines: dict[str, apb_jax.Engine]) -> None:
    assert identity(engines["fp8"])["weights_dtype"] == "fp8"
    assert "weights_dtype" not in identity(engines["wide"])


def test_the_plan_counts_the_bytes_that_are_there(engines: dict[str, apb_jax.Engine]) -> None:
    for engine in engines.values():
        held = sum(array.nbytes for _, array in _arrays(engine))
        assert weight_bytes(Case.of(engine)) == held


AMPERE = device.Device("gpu", "NVIDIA A100", (8, 0))


@pytest.mark.parametrize(
    ("changes", "where", "split", "words"),
    [
        ({}, AMPERE, {}, r"Ada or Hopper \(compute capability 8.9 or newer\); NVIDIA A100 has 8.0"),
        ({}, device.Device("gpu", "gfx942"), {}, r"gfx942 has none"),
        ({"intermediate_size": 120}, device.HOPPER, {}, r"sizes that 16 divides; layers.gate has 120"),
        ({}, device.HOPPER, {"tp": 2, "slices": 4}, r"layers.k has 64 split over 8 devices"),
    ],
)
def test_refusals(model: Any, changes: Any, where: Any, split: Any, words: str) -> None:
    config = dataclasses.replace(model.config, **changes)
    assert re.search(words, str(refusal(config, where, **split)))


def test_an_engine_refuses_before_weights_are_read(model: Any) -> None:
    with device.assume(AMPERE), pytest.raises(UserError, match=r"A100 has 8.0; nearest legal choice: --weights-dtype"):
        apb_jax.Engine(model, "full", apb_jax.make_mesh(1), precision=FP8)


def test_recipes() -> None:
    assert Precision.of("bf16") == Precision.of(None) == Precision()
    assert Precision.of("fp8").weights == "fp8"
    assert Precision.of("fp8", weights="model").weights == "model"
    assert str(Precision(weights="fp8")) == "fp8 weights"
    assert Precision().word == "bf16"
    with pytest.raises(UserError, match=r"the precision is 'int4'; it can be bf16, fp8"):
        Precision.of("int4")
    assert RunConfig(precision="fp8", compare=("apb@bf16",)).precisions == Precision.of("fp8")
    with pytest.raises(UserError, match=r"--compare apb@fp8 is the method itself.*apb@bf16"):
        RunConfig(precision="fp8", compare=("apb@fp8",))


def test_the_command_says_what_ran(capsys: pytest.CaptureFixture[str]) -> None:
    """Header, JSON and receipt of a run beside itself in bf16; the plan at half the bytes."""
    line = [
        "--seq",
        "300",
        "--sp",
        "1",
        "--shards",
        "2",
        "--max-new-tokens",
        "1",
        "--no-mass",
        "--repeat",
        "0",
        "--json",
    ]
    run_main(["--weights-dtype", "fp8", "--compare", "apb@bf16", *line])
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert result["precision"]["weights"] == "fp8"
    assert result["compare"][0]["precision"]["weights"] == "model"
    assert result["compare"][0]["receipt"]["kl_mean"] > 0
    assert "float32, fp8 weights, kernels auto" in shown.err
    assert "apb@bf16" in shown.err
    totals = []
    for choice in ("model", "fp8"):
        plan_main(["--model", "llama3.1-8b", "--seq", "128k", "--weights-dtype", choice, "--json"])
        totals.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [one["weights_dtype"] for one in totals] == ["model", "fp8"]
    assert totals[1]["components"]["weights"] < 0.58 * totals[0]["components"]["weights"]
    assert run_main(["--compare", "apb@int4"]) == 2
    assert "behind @ comes a precision, bf16 or fp8" in capsys.readouterr().err
